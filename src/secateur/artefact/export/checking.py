"""Check that a written file computes the same as the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from secateur.artefact.export.trials import Trials
from secateur.common.foreign import details, error_text
from secateur.common.models import named_tensors
from secateur.errors import ExportError
from secateur.graph.inputs import Arguments, batch_size
from secateur.targets.units.compare import relative_difference


class OtherSizesError(ExportError):
    """A file is right at the sizes of the user's inputs, and wrong at others."""


CLOSE = "Export in float32, or pass tolerance= if that is close enough."

Runs = Callable[[tuple[Any, ...], Mapping[str, Any]], list[torch.Tensor]]
"""Runs a written file on (args, kwargs), and returns its output tensors as a flat list."""


@dataclass(frozen=True)
class Exported:
    """The result of an export: the file, and its difference from the model.

    Attributes:
        path: The file or folder.
        difference: The largest over outputs and trials of max|file - model| / max|model|.
        tolerance: The largest accepted difference.
        batches: The batch sizes that were compared; more than one if the file accepts any.
        open: The axes that may have other sizes, each compared at one; such as ``batch`` and ``axis 1 of
            input_ids and attention_mask``. Empty for a folder, which takes what the model takes.
        runtime: The program that ran the file: ``onnxruntime``, ``torch``, ``transformers``, or ``gguf`` for
            a ``.gguf`` file, which is run from what it says alone, as llama.cpp would.
    """

    path: Path
    difference: float
    tolerance: float
    batches: tuple[int, ...]
    runtime: str
    open: tuple[str, ...] = ()


def tolerance_of(trials: Trials, *, same_code: bool = False) -> float:
    """Return the default tolerance: sqrt(eps) of the coarsest dtype among weights and outputs.

    This is half of the digits of the dtype. With `same_code` the file is run by the same code as the model,
    which rounds the same way; then the tolerance is at most 100 eps.
    """
    tensors = (*named_tensors(trials.model).values(), *trials.wanted[0])
    eps = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=1e-14)
    return float(min(eps**0.5, 100 * eps) if same_code else eps**0.5)


def check(
    path: Path, runs: Runs, trials: Trials, runtime: str, tolerance: float, *, other: str = CLOSE
) -> Exported:
    """Run the written file on every trial and compare its outputs with the model's.

    Args:
        path: The final path of the file, for messages.
        runs: Runs the written file.
        trials: The inputs, and the model's outputs.
        runtime: The name of the program that runs the file, for messages.
        tolerance: The largest accepted relative difference.
        other: What to do if it computes something else.

    Raises:
        ExportError: If the outputs differ by more than the tolerance, or the file cannot be run. It is an
            `OtherSizesError` if that is so at other sizes than those of the first trial.
    """
    worst = 0.0
    firm = len(trials.arguments) - trials.refusable
    for number, ((args, kwargs), wanted) in enumerate(zip(trials.arguments, trials.wanted, strict=True)):
        size = batch_size((args, kwargs))
        raised = OtherSizesError if _shapes((args, kwargs)) != _shapes(trials.arguments[0]) else ExportError
        try:
            found = [t.cpu() for t in runs(args, kwargs)]
        except Exception as error:  # a runtime raises its own
            if number >= firm:
                continue
            raise raised(
                f"export({path}): expected {runtime} to run what was written with a batch of {size}, got "
                f"{_said(error)}. Nothing was kept. {_remedy(trials, runtime)}",
                details(error),
            ) from error
        difference = relative_difference(found, [t.cpu() for t in wanted])
        if not difference <= tolerance:
            raise raised(
                f"export({path}): expected what {runtime} computes to equal {type(trials.model).__name__} "
                f"to {tolerance:.1g} relative, got a largest difference of {difference:.3g} with a batch of "
                f"{size}. Nothing was kept. {other}"
            )
        worst = max(worst, difference)
    return Exported(path, worst, tolerance, trials.batches, runtime)


def _shapes(arguments: Arguments) -> list[tuple[int, ...]]:
    return [tuple(v.shape) for v in pytree.tree_leaves(arguments) if isinstance(v, torch.Tensor)]


def _said(error: Exception) -> str:
    """Return a runtime's error message. Of ONNX Runtime's long one, only the operator that it lacks."""
    lacking = re.search(r"Could not find an implementation for (\w+)", str(error))
    return f"no kernel for its operator {lacking[1]}" if lacking else error_text(error)


def _remedy(trials: Trials, runtime: str) -> str:
    dtypes = {t.dtype for t in named_tensors(trials.model).values() if t.is_floating_point()}
    if runtime == "onnxruntime" and (other := sorted(map(str, dtypes - {torch.float32}))):
        names = " and ".join(name.removeprefix("torch.") for name in other)
        return (
            f"The model is in {names}, for which {runtime} has few operators: export model.float() with "
            f"inputs in float32, or to .pt2."
        )
    return f"Export to another format, or try another version of {runtime}."
