"""What runs a model: PyTorch as it is, `torch.compile`, or ONNX Runtime."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SettingError
from secateur.export.capturing import captured
from secateur.export.checking import check, tolerance_of
from secateur.export.onnx import feeds, onnx_runner, require_onnx, session_of, write_onnx
from secateur.export.trials import captured_trials
from secateur.graph.inputs import InputSpec
from secateur.latency.timing import restored_subnormals
from secateur.models import device_of, evaluating

Call = Callable[[], object]
Models = Sequence[nn.Module]


@contextmanager
def eager(models: Models, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[list[Call]]:
    """PyTorch, operator by operator."""
    with ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(evaluating(model, fast_path=True))
        yield [_call(model, args, kwargs) for model in models]


@contextmanager
def compiled(models: Models, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[list[Call]]:
    """`torch.compile` for these very shapes; compiled before the calls are handed out.

    The compiler keeps few variants of one class's code, so it starts afresh and forgets them afterwards. A
    model that needs more is refused: past that it would run as it is, and be timed as if it were compiled.
    """
    with _unwarned():
        import torch._dynamo as dynamo

        dynamo.reset()
    try:
        with eager(models, args, kwargs), dynamo.config.patch(fail_on_recompile_limit_hit=True):
            with _unwarned():
                fast = [torch.compile(model, dynamic=False) for model in models]
                for model in fast:
                    model(*args, **kwargs)
            yield [_call(model, args, kwargs) for model in fast]
    finally:
        dynamo.reset()


@contextmanager
def onnxruntime(models: Models, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[list[Call]]:
    """ONNX Runtime on the CPU, on as many threads as PyTorch, with files checked against the models."""
    require_onnx()
    elsewhere = [device_of(model) for model in models if device_of(model).type != "cpu"]
    if elsewhere:
        raise SettingError(
            f"bench(onnxruntime): expected models on the CPU, got one on {elsewhere[0]}. Move it first."
        )
    with tempfile.TemporaryDirectory() as folder, restored_subnormals():
        calls = []
        for number, model in enumerate(models):
            path = Path(folder) / f"{number}.onnx"
            found = captured(model, args, kwargs)
            write_onnx(found, path)
            given = (args, dict(kwargs))
            trials = captured_trials(model, given, InputSpec.of(*given, model), dynamic=found.dynamic)
            check(path, onnx_runner(path), trials, "onnxruntime", tolerance_of(trials))
            session = session_of(path, {"intra_op_num_threads": torch.get_num_threads()}, flush=True)
            calls.append(_session_call(session, feeds(session, args, kwargs)))
        yield calls


BACKENDS: Mapping[str, Callable[..., AbstractContextManager[list[Call]]]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
}
"""By name, what makes models ready: a context manager that gives a call for each."""


def _call(model: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    return lambda: model(*args, **kwargs)


def _session_call(session: Any, inputs: Mapping[str, Any]) -> Call:
    return lambda: session.run(None, inputs)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the compiler's warnings of its own internals; what stops it comes as an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
