"""`sc.export`: write a model for other programs, and check the file before it replaces an older one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from secateur.artefact.export.capturing import captured
from secateur.artefact.export.card import model_card
from secateur.artefact.export.checking import Exported, check, tolerance_of
from secateur.artefact.export.huggingface import (
    pretrained_runner,
    require_folder,
    require_pretrained,
    write_pretrained,
)
from secateur.artefact.export.onnx import onnx_runner, require_onnx, write_onnx
from secateur.artefact.export.owncode import own_code_runner, require_own_code, write_own_code
from secateur.artefact.export.program import program_runner, write_program
from secateur.artefact.export.trials import Trials, captured_trials, inputs_of
from secateur.artefact.writing import path_named, replacing, replacing_folder
from secateur.common.models import device_of, unwrap
from secateur.common.modes import require_numbers
from secateur.errors import ExportError, SettingError

SUFFIXES = (".onnx", ".pt2")


def export(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    tolerance: float | None = None,
    opset: int | None = None,
    card: str | None = None,
    own_code: bool = False,
) -> Exported:
    """Write a model for ONNX Runtime (``.onnx``), PyTorch alone (``.pt2``) or Hugging Face (a folder).

    The new file is written to a temporary place, run, and compared with the model: on the example inputs,
    and on random inputs (ids over the whole vocabulary, masks with padding). If the batch size is free, a
    second size is tried; for a folder also other lengths that the trace found to be free. Only then it
    replaces an older file. So an interrupted export leaves either the old file or the new one.

    Args:
        small: A module, captured program or masked model that `apply` returned, or any other model. It is
            not changed. It is exported in evaluation mode.
        path: Where to write. The suffix gives the format. Without a suffix it is a folder that stock
            ``from_pretrained`` loads, with a model card. That needs a Transformers model whose
            configuration can express the pruned sizes.
        example_inputs: As for `trace`: a tensor, a tuple of positional arguments or a mapping of keyword
            arguments. The first axis is the batch. Default: made from the shapes in the model's plan.
        tolerance: The largest accepted relative difference. Default: sqrt(eps) of the coarsest dtype, which
            is 3.5e-4 in float32. For a folder, which is run by the same code, 1.2e-5.
        opset: For ONNX, the version of the operator set. Default: the exporter's own choice.
        card: For a folder, the text of its README.md. Default: `model_card` of the model.
        own_code: For a folder: write a modeling file beside the configuration, for sizes that no
            configuration can say, such as another width in each layer. It is forty lines of ours, without
            code of the model's authors. Whoever loads the folder has to allow it:
            ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

    Returns:
        The path, and the largest difference from the model.

    Raises:
        ExportError: If the format lacks an operator, a configuration cannot express the sizes, or the
            written file computes something else.
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
    path, model = path_named("export", path, ExportError), unwrap(small)
    require_numbers("export", device_of(model))
    suffix = path.suffix.lower()
    _check_asked(model, path, suffix, opset, card, own_code)
    given, spec = inputs_of(model, example_inputs)
    if suffix:
        found = captured(model, *given)
        trials = captured_trials(model, given, spec, dynamic=found.dynamic)
    else:
        trials = Trials.of(model, given, spec, [{}, *(sizes for _, sizes in spec.other_sizes())])
    accepted = tolerance_of(trials, same_code=not suffix) if tolerance is None else tolerance
    place = replacing(path, ExportError, parents=True) if suffix else replacing_folder(path, ExportError)
    with place as written:
        if suffix == ".onnx":
            write_onnx(found, written, opset)
            done = check(path, onnx_runner(written), trials, "onnxruntime", accepted)
        elif suffix == ".pt2":
            write_program(found, written)
            done = check(path, program_runner(written), trials, "torch", accepted)
        elif own_code:
            write_own_code(model, written, model_card(model, own_code=True) if card is None else card)
            done = check(path, own_code_runner(written, model), trials, "transformers", accepted)
        else:
            write_pretrained(model, written, model_card(model) if card is None else card)
            done = check(path, pretrained_runner(written, model), trials, "transformers", accepted)
    return done


def _check_asked(
    model: nn.Module, path: Path, suffix: str, opset: int | None, card: str | None, own_code: bool
) -> None:
    """Raise an error for impossible settings now, before the slow steps."""
    if suffix not in (*SUFFIXES, ""):
        raise SettingError(
            f"export({path}): expected a file that ends in {' or '.join(SUFFIXES)}, or a folder, got "
            f"{path.suffix!r}. Name {path.with_suffix('.onnx').name}, for example."
        )
    for name, value, fits in (
        ("opset", opset, suffix == ".onnx"),
        ("card", card, not suffix),
        ("own_code", own_code or None, not suffix),
    ):
        if value is not None and not fits:
            raise SettingError(
                f"export({path}): expected no {name}= for this format. Leave it out, or name "
                f"{'a file that ends in .onnx' if name == 'opset' else 'a folder'}."
            )
    if suffix == ".onnx":
        require_onnx()
    elif not suffix:
        require_own_code(model, path) if own_code else require_pretrained(model, path)
        require_folder(path)
