"""Whether a written file computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.apply.compare import relative_difference
from secateur.errors import ExportError
from secateur.export.capturing import Captured
from secateur.graph.inputs import batch_size

Runs = Callable[[tuple[Any, ...], Mapping[str, Any]], list[torch.Tensor]]
"""Output tensors, flat, of what a file holds."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how close it comes to the model.

    Attributes:
        path: The file or folder.
        difference: The largest over outputs and trials of max|file - model| / max|model|.
        tolerance: What that had to stay under.
        batches: The batch sizes it was run with; two if the file takes any.
        runtime: What ran the file: ``onnxruntime``, ``torch`` or ``transformers``.
    """

    path: Path
    difference: float
    tolerance: float
    batches: tuple[int, ...]
    runtime: str


def tolerance_of(captured: Captured) -> float:
    """Half of the digits of the coarsest floating dtype among weights and outputs: the square root of eps."""
    tensors = (*captured.model.state_dict().values(), *captured.wanted[0])
    coarsest = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=1e-7)
    return float(coarsest**0.5)


def check(path: Path, runs: Runs, captured: Captured, runtime: str, tolerance: float | None) -> Exported:
    """Run what was written on every trial and compare it with the model.

    Args:
        path: Where the file will be.
        runs: Runs what was written.
        captured: The model and the trials.
        runtime: What `runs` runs it with.
        tolerance: The largest accepted relative difference; `tolerance_of` if None.

    Raises:
        ExportError: If the answers differ by more, or the file cannot be run.
    """
    accepted = tolerance_of(captured) if tolerance is None else tolerance
    worst = 0.0
    sizes = tuple(batch_size(trial) for trial in captured.trials)
    for size, (args, kwargs), wanted in zip(sizes, captured.trials, captured.wanted, strict=True):
        try:
            found = [t.cpu() for t in runs(args, kwargs)]
        except Exception as error:  # a runtime raises its own
            raise ExportError(
                f"export({path}): expected {runtime} to run what was written with a batch of {size}, got "
                f"{type(error).__name__}: {' '.join(str(error).split())[:400]}. Nothing was kept. "
                f"Export to another format, or report this as a bug."
            ) from error
        difference = relative_difference(found, [t.cpu() for t in wanted])
        if not difference <= accepted:
            raise ExportError(
                f"export({path}): expected what {runtime} computes to equal {type(captured.model).__name__} "
                f"to {accepted:.1g} relative, got a largest difference of {difference:.3g} with a batch of "
                f"{size}. Nothing was kept. Export in float32, or pass tolerance= if that is close enough."
            )
        worst = max(worst, difference)
    return Exported(path, worst, accepted, sizes, runtime)
