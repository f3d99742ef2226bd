"""The registry of repairs, and the combinations that ``auto`` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from secateur.calibration import Calibration
from secateur.common.training import Kept
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.repairs.batchnorm import batch_norms, reestimate
from secateur.repairs.judging import Judge
from secateur.repairs.polish import Polish
from secateur.repairs.sweep import sweep


@dataclass(frozen=True)
class Work:
    """The inputs of a repair.

    Attributes:
        graph: Returns the trace of the dense model. It is a function so that repairs which do not
            need a trace do not pay for one.
        data: Calibration data to fit on.
        progress: Show progress bars.
        judge: Measures a model on held-out data. None: a repair that trains returns its last state.
        share: Share of a limit of time that this run may use; the repair runs several times.
        kept: Where a repair that trains keeps its state behind each pass. None: a killed one starts again.
    """

    graph: Callable[[], Graph]
    data: Calibration
    progress: bool = False
    judge: Judge | None = None
    share: float = 1.0
    kept: Kept | None = None


class Method(Protocol):
    """A repair: it reduces the error of a pruned model without labels."""

    @property
    def name(self) -> str:
        """The name in the record."""

    @property
    def trains(self) -> bool:
        """Whether it takes minutes: then it runs on results, not on candidates or between rounds."""

    @property
    def run(self) -> Callable[[nn.Module, Work], dict[str, Any] | None]:
        """A function that changes a pruned model in place.

        It returns notes for the record, or None if the model has nothing that it can change.
        """


@dataclass(frozen=True)
class Repair:
    """A repair that is one function; see `Method`.

    Attributes:
        name: The name that users pass to `repair`.
        run: The function.
        trains: Whether it takes minutes.
    """

    name: str
    run: Callable[[nn.Module, Work], dict[str, Any] | None]
    trains: bool = False


Methods = str | Method | Sequence[str | Method] | None
"""What `repair` takes: a name or a repair, several of them, ``auto``, or None."""


def _batchnorm(small: nn.Module, work: Work) -> dict[str, Any] | None:
    if not batch_norms(small):
        return None
    reestimate(small, work.data.plain, progress=work.progress)
    return {}


def _sweep(small: nn.Module, work: Work, *, name: str) -> dict[str, Any] | None:
    layers = sweep(name, small, work.graph(), work.data, progress=work.progress)
    return {"layers": layers} if layers else None


REPAIRS: dict[str, Method] = {
    "reconstruct": Repair("reconstruct", partial(_sweep, name="reconstruct")),
    "variance": Repair("variance", partial(_sweep, name="variance")),
    "channelwise": Repair("channelwise", partial(_sweep, name="channelwise")),
    "layerwise": Repair("layerwise", partial(_sweep, name="layerwise")),
    "bias": Repair("bias", partial(_sweep, name="bias")),
    "batchnorm": Repair("batchnorm", _batchnorm),
    "polish": Polish(),
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


def resolve(methods: Methods, own: Mapping[str, Method] | None = None) -> tuple[tuple[Method, ...], ...]:
    """Return the combinations of repairs that `methods` asks for.

    Args:
        methods: None (no combination), ``auto`` (all of `AUTO`), one name or repair, or several that form one
            combination.
        own: The user's own repairs by name.

    Raises:
        SettingError: If a name is unknown, or something is neither a name nor a repair.
    """
    if methods is None:
        return ()
    if methods == "auto":
        return tuple(tuple(REPAIRS[name] for name in names) for names in AUTO)
    known = REPAIRS | dict(own or {})
    found = []
    for asked in listed(methods):
        method = known.get(asked) if isinstance(asked, str) else asked
        if method is None or not callable(getattr(method, "run", None)):
            raise SettingError(
                f"repair: expected None, 'auto' or names among {', '.join(known)}, got {asked!r}."
            )
        found.append(method)
    return (tuple(found),) if found else ()


def listed(methods: str | Method | Sequence[str | Method]) -> tuple[str | Method, ...]:
    """Return one repair, or several, as several."""
    return tuple(methods) if isinstance(methods, Sequence) and not isinstance(methods, str) else (methods,)


def name_of_repair(method: str | Method) -> str:
    """Return the name of a repair that was asked for by name or as an object."""
    return method if isinstance(method, str) else method.name


def quick(methods: Methods) -> Methods:
    """Return what is left of `methods` without repairs that train."""
    if methods is None or methods == "auto":
        return methods
    slow = {name for name, method in REPAIRS.items() if method.trains}
    left = [m for m in listed(methods) if not (m in slow if isinstance(m, str) else m.trains)]
    return left or None
