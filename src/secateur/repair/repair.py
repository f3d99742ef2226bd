"""`sc.repair`: try repairs in order, and keep what measurably helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.apply.copying import duplicate
from secateur.apply.record import attach, record_of, with_repairs
from secateur.calibration import Calibration, seeded
from secateur.errors import CalibrationError, SettingError
from secateur.evaluate import Evaluation, evaluate
from secateur.repair.batchnorm import batch_norms, reestimate
from secateur.score.loss import LossFn


@dataclass(frozen=True)
class Repair:
    """A way to undo part of the damage without labels.

    Attributes:
        name: What users call it.
        applies: Whether the model has anything that it could change.
        run: Changes the model in place: (pruned model, dense model, calibration, progress).
    """

    name: str
    applies: Callable[[nn.Module], bool]
    run: Callable[[nn.Module, nn.Module, Calibration, bool], None]


REPAIRS = {
    "batchnorm": Repair(
        "batchnorm",
        lambda model: bool(batch_norms(model)),
        lambda small, dense, data, progress: reestimate(small, data, progress=progress),
    ),
}
"""Name -> repair, in the order in which ``auto`` tries them."""


def resolve(methods: str | Sequence[str] | None) -> tuple[Repair, ...]:
    """Repairs by name: None for none, ``auto`` for all.

    Raises:
        SettingError: If a name is unknown.
    """
    if methods is None:
        return ()
    if methods == "auto":
        return tuple(REPAIRS.values())
    names = (methods,) if isinstance(methods, str) else tuple(methods)
    unknown = [name for name in names if name not in REPAIRS]
    if unknown:
        raise SettingError(
            f"repair: expected None, 'auto' or names among {', '.join(REPAIRS)}, got {unknown[0]!r}."
        )
    return tuple(REPAIRS[name] for name in names)


def repair(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: str | Sequence[str] | None = "auto",
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Undo what can be undone of the damage that pruning did, without training.

    Each method works on four fifths of the batches and is judged on the rest: by the loss where the
    data has labels, else by the distance to the dense model's outputs. What does not lower that is
    taken back, so the result never measures worse than what came in.

    Args:
        small: What `apply` returned; it is left as it was.
        model: The dense model.
        calibration: What `Calibration.of` takes; labels only judge.
        methods: ``auto``, a name, several in order, or None. Known: ``batchnorm``.
        loss_fn: As for `score`; it judges instead of the default loss.
        seed: For shuffling loaders.
        progress: Show bars on a terminal.

    Returns:
        A new model; `secateur.record_of(result).repairs` says what was tried and what it brought.

    Raises:
        SettingError: If a method is unknown.
        ArtifactError: If `small` did not come from `apply`.
        CalibrationError: If the data is empty, or too little to hold some out.
    """
    record_of(small)
    chosen = resolve(methods)
    best = duplicate(small)
    if not chosen:
        return best
    fit, held = Calibration.of(calibration, seed=seed).split()
    tried: list[dict[str, Any]] = []
    with seeded(seed):

        def judge(candidate: nn.Module) -> Evaluation:
            return evaluate(candidate, held, dense=model, loss_fn=loss_fn)

        before = judge(best)
        for method in chosen:
            if not method.applies(best):
                tried.append(
                    {
                        "method": method.name,
                        "kept": False,
                        "why": "the model has nothing that it could change",
                    }
                )
                continue
            candidate = duplicate(best)
            try:
                method.run(candidate, model, fit, progress)
            except CalibrationError as error:
                tried.append({"method": method.name, "kept": False, "why": str(error)})
                continue
            after = judge(candidate)
            helps = math.isfinite(after.loss) and (after.loss < before.loss or not math.isfinite(before.loss))
            tried.append(
                {
                    "method": method.name,
                    "kept": helps,
                    "measure": before.measure,
                    "before": before.loss,
                    "after": after.loss,
                    "held_out_samples": after.samples,
                }
            )
            if helps:
                best, before = candidate, after
    flush_subnormals(best)
    attach(best, record_of(small))
    return with_repairs(best, tried)


def flush_subnormals(model: nn.Module) -> None:
    """Set stored values too small for the dtype's normal range to zero: CPUs compute with them slowly.

    Half precision is left alone: its small values matter, and are computed with in single precision.
    """
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dtype in (torch.float32, torch.float64):
                tensor[tensor.abs() < torch.finfo(tensor.dtype).tiny] = 0
