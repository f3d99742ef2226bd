"""`sc.export`: write a model for other programs, and check the file before it replaces an older one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from secateur.artefact.export.boundary_sizes import boundary_sizes, too_large
from secateur.artefact.export.cached import OPEN, cached_program
from secateur.artefact.export.capturing import Captured, captured
from secateur.artefact.export.card import model_card
from secateur.artefact.export.checking import Exported, OtherSizesError, check, tolerance_of
from secateur.artefact.export.gguf import OTHER, gguf_trials, require_gguf, write_gguf
from secateur.artefact.export.gguf_running import gguf_runner
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
from secateur.artefact.writing import replacing, replacing_folder
from secateur.common.models import device_of, unwrap
from secateur.common.modes import require_numbers
from secateur.common.paths import path_named
from secateur.errors import CaptureError, ExportError, SettingError
from secateur.graph.inputs import Arguments, InputSpec
from secateur.graph.leaf import Place
from secateur.targets.units.graph_form.opened import TooMuchError, further_axes, limited

SUFFIXES = (".onnx", ".pt2", ".gguf")


def export(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    tolerance: float | None = None,
    opset: int | None = None,
    card: str | None = None,
    own_code: bool = False,
    fixed: bool = False,
    cache: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Exported:
    """Write a model for other programs: ``.onnx``, ``.pt2``, ``.gguf``, or a folder for Hugging Face.

    ``.onnx`` is run by ONNX Runtime, ``.pt2`` by PyTorch alone, ``.gguf`` by llama.cpp.

    The new file is written to a temporary place, run, and compared with the model: on the example inputs, and
    on random inputs (ids over the whole vocabulary, masks with padding). The axes that the trace found to be
    open, such as lengths and heights, are open in the file too if the code allows it, and the file is
    compared at other sizes of each, also at one, and at the sizes about which the code asks; ``open`` of the
    result names them. Else the batch alone is open, if it can be, else no axis. Only then it replaces an
    older file. So an interrupted export leaves either the old file or the new one.

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
        fixed: For ``.onnx`` and ``.pt2``: no axis may have another size than in `example_inputs`. Some
            runtimes, of phones for example, want that.
        cache: For ``.onnx``, of a causal language model of Transformers: the file takes and returns the keys
            and values of earlier tokens, so that each new token costs one pass over itself.
            Inputs: ``input_ids`` and ``position_ids`` [batch, new], ``attention_mask`` [batch, cached + new],
            ``past_key_values.0.key`` and so on [batch, heads, cached, head size]. Outputs: ``logits`` and
            ``present.0.key`` and so on. `example_inputs` are not needed.
        tokenizer: For ``.gguf``: a GGUF file of the dense model, whose tokenizer is copied. Default: the file
            has no tokenizer, and takes token ids. A ``.gguf`` file needs no `example_inputs`. It holds
            decoders such as Llama, Mistral, Qwen2 and Qwen3, with another number of heads and neurons in each
            layer too; weights have the model's dtype, so quantise the file with llama.cpp's own tool.

    Returns:
        The path, the largest difference from the model, and the axes that may have other sizes.

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
        >>> done.open
        ('batch',)
    """
    path, model = path_named("export", path, ExportError), unwrap(small)
    require_numbers("export", device_of(model))
    suffix = path.suffix.lower()
    _check_asked(model, path, suffix, opset, card, own_code, fixed, cache, tokenizer)
    if cache:
        return _written(*cached_program(model), path, tolerance, opset, OPEN)
    if suffix == ".gguf":
        trials = gguf_trials(model)
        with replacing(path, ExportError, parents=True) as written:
            write_gguf(
                model,
                written,
                None if tokenizer is None else path_named("export: tokenizer", tokenizer, ExportError),
            )
            accepted = tolerance_of(trials) if tolerance is None else tolerance
            done = check(path, gguf_runner(written), trials, "gguf", accepted, other=OTHER)
        return replace(done, open=("batch", "tokens"))
    given, spec = inputs_of(model, example_inputs)
    if suffix:
        options = model, path, given, spec, tolerance, opset
        also = [] if fixed else further_axes(spec, given)
        if also:
            with contextlib.suppress(CaptureError, ExportError, TooMuchError):
                return _as_program(*options, also)
        if not fixed:
            with contextlib.suppress(OtherSizesError):
                return _as_program(*options, ())
        return _as_program(*options, None)
    trials = Trials.of(model, given, spec, [{}, *(sizes for _, sizes in spec.other_sizes())])
    accepted = tolerance_of(trials, same_code=True) if tolerance is None else tolerance
    with replacing_folder(path, ExportError) as written:
        if own_code:
            write_own_code(model, written, model_card(model, own_code=True) if card is None else card)
            done = check(path, own_code_runner(written, model), trials, "transformers", accepted)
        else:
            write_pretrained(model, written, model_card(model) if card is None else card)
            done = check(path, pretrained_runner(written, model), trials, "transformers", accepted)
    return done


def _as_program(
    model: nn.Module,
    path: Path,
    given: Arguments,
    spec: InputSpec,
    tolerance: float | None,
    opset: int | None,
    also: Collection[Place] | None,
) -> Exported:
    """Capture a model, write the program, and check the file; see `export`.

    Args:
        model: The model.
        path: Where to write.
        given: The inputs to capture it with.
        spec: The description of the inputs that it accepts.
        tolerance: The largest accepted relative difference; None: the default.
        opset: For ONNX.
        also: Axes beside the batch that have to be open. Tensors are numbered. None: no axis may be open,
            nor the batch.

    Raises:
        ExportError: If the file cannot be written, or computes something else at any size that was tried, or
            if an axis of `also` cannot be open.
        CaptureError: If the model cannot be captured.
        TooMuchError: With these axes open, its sizes are too complicated.
    """
    with limited() if also else contextlib.nullcontext():
        found = captured(model, *given, also)
    if not found.open.issuperset(also or ()):
        raise ExportError(f"export({path}): expected further axes to be open in the program, got fixed ones.")
    names = [*spec.tensors()]
    places = {(names[int(number)], axis) for number, axis in found.open}
    free = [axis for axis in spec.open if places.issuperset(axis.places)]
    others = [sizes for _, sizes in spec.other_sizes() if places.issuperset(sizes)]
    holds_ranges = path.suffix.lower() == ".pt2"
    ends = [
        {(names[int(number)], axis): n for (number, axis), n in sizes.items()}
        for sizes in boundary_sizes(found.program, ranges=holds_ranges)
    ]
    shapes = [*zip(names, (leaf.shape for leaf in InputSpec.of(*given).tensors().values()), strict=True)]
    if far := [sizes for sizes in ends if too_large(shapes, sizes)]:
        raise OtherSizesError(
            f"export({path}): expected a program for any size, got code with a condition on a size of "
            f"{max(far[0].values())}, which is too large to compare. Export with fixed=True."
        )
    trials = captured_trials(
        model, given, spec, dynamic=found.dynamic, also=others if also else (), refusable=ends
    )
    batch = ["batch"] if found.dynamic else []
    open_axes = (*batch, *(axis.name() for axis in free if not axis.batch))
    return _written(found, trials, path, tolerance, opset, open_axes)


def _written(
    found: Captured,
    trials: Trials,
    path: Path,
    tolerance: float | None,
    opset: int | None,
    open_axes: tuple[str, ...],
) -> Exported:
    """Write a program, and check the file on the trials; see `export`."""
    accepted = tolerance_of(trials) if tolerance is None else tolerance
    with replacing(path, ExportError, parents=True) as written:
        if path.suffix.lower() == ".onnx":
            write_onnx(found, written, opset)
            done = check(path, onnx_runner(written), trials, "onnxruntime", accepted)
        else:
            write_program(found, written)
            done = check(path, program_runner(written), trials, "torch", accepted)
    return replace(done, open=open_axes)


def _check_asked(
    model: nn.Module,
    path: Path,
    suffix: str,
    opset: int | None,
    card: str | None,
    own_code: bool,
    fixed: bool,
    cache: bool,
    tokenizer: str | os.PathLike[str] | None,
) -> None:
    """Raise an error for impossible settings now, before the slow steps."""
    if suffix not in (*SUFFIXES, ""):
        raise SettingError(
            f"export({path}): expected a file that ends in {' or '.join(SUFFIXES)}, or a folder, got "
            f"{path.suffix!r}. Name {path.with_suffix('.onnx').name}, for example."
        )
    for name, value, fits, where in (
        ("opset", opset, suffix == ".onnx", "a file that ends in .onnx"),
        ("card", card, not suffix, "a folder"),
        ("own_code", own_code or None, not suffix, "a folder"),
        ("fixed", fixed or None, suffix in (".onnx", ".pt2") and not cache, "a file, without cache="),
        ("cache", cache or None, suffix == ".onnx", "a file that ends in .onnx"),
        ("tokenizer", tokenizer, suffix == ".gguf", "a file that ends in .gguf"),
    ):
        if value is not None and not fits:
            raise SettingError(
                f"export({path}): expected no {name}= for this format. Leave it out, or name {where}."
            )
    if suffix == ".onnx":
        require_onnx()
    elif suffix == ".gguf":
        require_gguf()
    elif not suffix:
        require_own_code(model, path) if own_code else require_pretrained(model, path)
        require_folder(path)
