"""The registry of repairs, and the combinations that ``auto`` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from secateur.calibration import Calibration
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.repairs.batchnorm import batch_norms, reestimate
from secateur.repairs.sweep import sweep


@dataclass(frozen=True)
class Work:
    """The inputs of a repair.

    Attributes:
        graph: Returns the trace of the dense model. It is a function so that repairs which do not
            need a trace do not pay for one.
        data: Calibration data to fit on.
        progress: Show progress bars.
    """

    graph: Callable[[], Graph]
    data: Calibration
    progress: bool = False


@dataclass(frozen=True)
class Repair:
    """A repair method: it reduces the error of a pruned model without labels.

    Attributes:
        name: The name that users pass to `repair`.
        run: Changes a pruned model in place. It returns notes for the record, or None if the model has
            nothing that this method can change.
    """

    name: str
    run: Callable[[nn.Module, Work], dict[str, Any] | None]


def _batchnorm(small: nn.Module, work: Work) -> dict[str, Any] | None:
    if not batch_norms(small):
        return None
    reestimate(small, work.data.plain, progress=work.progress)
    return {}


def _sweep(small: nn.Module, work: Work, *, name: str) -> dict[str, Any] | None:
    layers = sweep(name, small, work.graph(), work.data, progress=work.progress)
    return {"layers": layers} if layers else None


REPAIRS = {
    "reconstruct": Repair("reconstruct", partial(_sweep, name="reconstruct")),
    "variance": Repair("variance", partial(_sweep, name="variance")),
    "channelwise": Repair("channelwise", partial(_sweep, name="channelwise")),
    "layerwise": Repair("layerwise", partial(_sweep, name="layerwise")),
    "bias": Repair("bias", partial(_sweep, name="bias")),
    "batchnorm": Repair("batchnorm", _batchnorm),
}
"""The built-in repairs by name."""

AUTO = (
    ("batchnorm",),
    ("bias",),
    ("variance",),
    ("variance", "batchnorm"),
    ("reconstruct",),
    ("reconstruct", "batchnorm"),
)
"""The combinations that ``auto`` compares. If two are equally good, the earlier one wins."""


def resolve(
    methods: str | Sequence[str] | None, own: Mapping[str, Repair] | None = None
) -> tuple[tuple[Repair, ...], ...]:
    """Return the combinations of repairs that `methods` asks for.

    Args:
        methods: None (no combination), ``auto`` (all of `AUTO`), one name, or several names that
            form one combination.
        own: The user's own repairs by name.

    Raises:
        SettingError: If a name is unknown.
    """
    if methods is None:
        return ()
    if methods == "auto":
        return tuple(tuple(REPAIRS[name] for name in names) for names in AUTO)
    names = (methods,) if isinstance(methods, str) else tuple(methods)
    known = REPAIRS | dict(own or {})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingError(
            f"repair: expected None, 'auto' or names among {', '.join(known)}, got {unknown[0]!r}."
        )
    return (tuple(known[name] for name in names),) if names else ()
