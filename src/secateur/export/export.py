"""`sc.export`: a model into a file that other programs load, checked before it is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import SettingError
from secateur.export.capturing import captured
from secateur.export.card import model_card
from secateur.export.checking import Exported, check, tolerance_of
from secateur.export.huggingface import pretrained_runner, require_pretrained, write_pretrained
from secateur.export.onnx import onnx_runner, require_onnx, write_onnx
from secateur.export.program import program_runner, write_program
from secateur.export.trials import Trials, captured_trials, inputs_of
from secateur.export.writing import beside, put, put_folder
from secateur.models import unwrap

SUFFIXES = (".onnx", ".pt2")


def export(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    tolerance: float | None = None,
    opset: int | None = None,
    card: str | None = None,
) -> Exported:
    """Write a model for ONNX Runtime (``.onnx``), PyTorch alone (``.pt2``) or Hugging Face (a folder).

    What was written is run and compared with the model before it takes its place: on the example inputs and
    on drawn ones, with ids over the whole vocabulary and masks with padding. Where the batch axis may have
    any size, a second one is tried; for a folder also other lengths that the trace found to be open. A file
    that was there stays until then, so an interrupted export leaves the old file or the new one.

    Args:
        small: A module, a captured program or a masked model of `apply`, or any other model; it is left as
            it was and exported in evaluation mode.
        path: Where to write; the suffix chooses the format. Without a suffix, the folder of a Transformers
            model that stock ``from_pretrained`` loads, with a model card; possible where the configuration
            can say the pruned sizes.
        example_inputs: As for `trace`: a tensor, a tuple of positional arguments or a mapping of keyword
            arguments. The first axis is the batch. Made from the shapes in the model's plan if not given.
        tolerance: The largest accepted relative difference; if None, half of the digits of the coarsest
            dtype, 3.5e-4 in float32. For a folder, which the same code runs, it is 1.2e-5.
        opset: For ONNX, the version of the operator set; the exporter's own choice if None.
        card: For a folder, the text of its README.md, as `model_card` writes it; made from the model if None.

    Returns:
        The path, and how close the file comes to the model.

    Raises:
        ExportError: If an operator has no counterpart in the format, a configuration cannot give the sizes,
            or what was written computes something else.
        CaptureError: If `torch.export` cannot capture the model.
        SettingError: If the suffix is unknown, inputs are needed, or ``.onnx`` needs what is not installed.

    Example:
        >>> import tempfile, torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = export(net, f"{folder}/net.pt2", torch.zeros(3, 4))
        >>> done.difference <= done.tolerance, done.batches
        (True, (3, 4))
    """
    path, model = Path(path), unwrap(small)
    suffix = path.suffix.lower()
    _check_asked(model, path, suffix, opset, card)
    given, spec = inputs_of(model, example_inputs)
    if suffix:
        found = captured(model, *given)
        trials = captured_trials(model, given, spec, dynamic=found.dynamic)
    else:
        trials = Trials.of(model, given, spec, [{}, *(sizes for _, sizes in spec.other_sizes())])
    accepted = tolerance_of(trials, same_code=not suffix) if tolerance is None else tolerance
    with beside(path) as folder:
        written = folder / path.name
        if suffix == ".onnx":
            write_onnx(found, written, opset)
            done = check(path, onnx_runner(written), trials, "onnxruntime", accepted)
        elif suffix == ".pt2":
            write_program(found, written)
            done = check(path, program_runner(written), trials, "torch", accepted)
        else:
            write_pretrained(model, written, model_card(model) if card is None else card)
            done = check(path, pretrained_runner(written, model), trials, "transformers", accepted)
        (put if suffix else put_folder)(written, path)
    return done


def _check_asked(model: nn.Module, path: Path, suffix: str, opset: int | None, card: str | None) -> None:
    """Refuse what cannot be, before anything takes time."""
    if suffix not in (*SUFFIXES, ""):
        raise SettingError(
            f"export({path}): expected a file that ends in {' or '.join(SUFFIXES)}, or a folder, got "
            f"{path.suffix!r}. Name {path.with_suffix('.onnx').name}, for example."
        )
    for name, value, fits in (("opset", opset, suffix == ".onnx"), ("card", card, not suffix)):
        if value is not None and not fits:
            raise SettingError(
                f"export({path}): expected no {name}= for this format. Leave it out, or name "
                f"{'a file that ends in .onnx' if name == 'opset' else 'a folder'}."
            )
    if suffix == ".onnx":
        require_onnx()
    elif not suffix:
        require_pretrained(model, path)
