"""Write ONNX files with PyTorch's exporter, and run them with ONNX Runtime."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from secateur.artefact.export.capturing import Captured
from secateur.artefact.export.checking import Runs
from secateur.artefact.export.program import about
from secateur.errors import ExportError, SettingError

ONE_FILE_BYTES = 1_900_000_000
"""If the tensors have more bytes than this, they go into a second file: a protocol buffer holds at most
two gigabytes."""

BATCH = "batch"


def require_onnx() -> None:
    """Check that onnx, onnxscript and onnxruntime are installed.

    Raises:
        SettingError: If one of them is missing.
    """
    try:
        with _quiet():
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingError(
            f"export: expected onnx, onnxscript and onnxruntime, which write and check ONNX files, got "
            f'{error}. Run pip install "secateur[export]".'
        ) from error


def write_onnx(captured: Captured, path: Path, opset: int | None = None) -> None:
    """Write a captured model as ONNX.

    A batch axis of free size is called ``batch``, another one by the first input that has it, such as
    ``input_ids_1``. Inputs and outputs have the model's names. Tensors that
    are too large for one file go into ``<name>.<checksum>.data`` beside it.

    Args:
        captured: The captured model.
        path: The file to write.
        opset: Version of the operator set. Default: the exporter's own choice.

    Raises:
        ExportError: If an operator has no counterpart in ONNX.
    """
    require_onnx()
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _quiet():
        try:
            made = torch.onnx.export(
                captured.program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=captured.inputs,
                output_names=captured.outputs,
            )
        except Exception as error:  # the exporter raises its own
            raise ExportError(
                f"export({path.name}): expected {type(captured.model).__name__} to have only operators that "
                f"ONNX knows, got {type(error).__name__}: {_last_line(error)} Export to .pt2 instead."
            ) from error
        if made is None:
            raise ExportError(
                f"export({path.name}): expected a program, got none from torch.onnx.export. Use .pt2."
            )
        _name_axes(captured, made)
        model = made.model
        ClearMetadataAndDocStringPass()(model)
        model.metadata_props.update({f"secateur.{k}": v for k, v in about(captured.model).items()})
        size = sum(t.nbytes for t in map(_stored, model.graph.initializers.values()) if t is not None)
        data = None
        if size > ONE_FILE_BYTES:
            data = f"{path.name}.{_checksum(captured)}.data"
        onnx_ir.save(model, path, external_data=data)


def onnx_runner(path: Path, options: Mapping[str, Any] | None = None) -> Runs:
    """Return a function that runs a file with ONNX Runtime on the CPU.

    Args:
        path: The file.
        options: Session options by name, for example ``{"intra_op_num_threads": 1}``.
    """
    session = lru_cache(lambda: session_of(path, options))  # made by the first run, which may fail there

    def runs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        found = session().run(None, feeds(session(), args, kwargs))
        return [torch.as_tensor(value) for value in found]

    return runs


def session_of(path: Path, options: Mapping[str, Any] | None = None, *, flush: bool = False) -> Any:
    """Return an ONNX Runtime session that prints nothing on stderr.

    Args:
        path: The ONNX file.
        options: Session options by name.
        flush: Flush subnormal numbers to zero. Note that ONNX Runtime sets this for the calling thread, so
            it also holds for everything else that the thread computes afterwards.
    """
    require_onnx()
    import onnxruntime

    settings = session_options(options, flush=flush)
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def session_options(options: Mapping[str, Any] | None = None, *, flush: bool = False) -> Any:
    """Return options of a session that prints nothing on stderr. The arguments are those of `session_of`."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    for name, value in (options or {}).items():
        setattr(settings, name, value)
    if flush:
        settings.add_session_config_entry("session.set_denormal_as_zero", "1")
    return settings


def feeds(session: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's tensors as NumPy arrays by the session's input names. Both are in the same order."""
    leaves = [v for v in pytree.tree_leaves((args, dict(kwargs))) if isinstance(v, torch.Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    return {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}


def _stored(value: Any) -> Any:
    return value.const_value


def _name_axes(captured: Captured, made: Any) -> None:
    """Name the symbols of free axes."""
    names: dict[Any, str] = {}
    for value in made.model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                first_axis = axis == 0 and captured.dynamic and BATCH not in names.values()
                names.setdefault(size.value, BATCH if first_axis else f"{value.name}_{axis}")
    if names:
        made.rename_axes(names)


def _checksum(captured: Captured) -> str:
    digest = hashlib.sha256()
    for name, tensor in captured.program.state_dict.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _last_line(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return " ".join(lines)[:400] if lines else type(cause).__name__ + "."


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings and logs inside the block. Real failures of the exporter are exceptions."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for log in logs:
                log.setLevel(logging.ERROR)
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)
