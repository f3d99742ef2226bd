"""Back ends that run a model for timing: eager PyTorch, `torch.compile` and ONNX Runtime.

Each back end is a context manager. It takes models and their inputs, and gives one function per model that
runs a forward pass.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.artefact.export.capturing import captured
from secateur.artefact.export.checking import check, tolerance_of
from secateur.artefact.export.onnx import feeds, onnx_runner, require_onnx, session_of, write_onnx
from secateur.artefact.export.trials import captured_trials
from secateur.common.models import device_of, evaluating
from secateur.errors import SettingError
from secateur.graph.inputs import InputSpec
from secateur.measure.latency.timing import restored_subnormals

Call = Callable[[], object]
Models = Sequence[nn.Module]


@contextmanager
def eager(models: Models, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[list[Call]]:
    """Run the models in eager PyTorch, in evaluation mode and without gradients."""
    with ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(evaluating(model, fast_path=True))
        yield [_call(model, args, kwargs) for model in models]


@contextmanager
def compiled(models: Models, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[list[Call]]:
    """Run the models with `torch.compile`, compiled for exactly these input shapes.

    The models are compiled before the functions are given out, so compilation is not timed. The compiler
    keeps only a few variants of a class's code, so its cache is cleared before and after. A model that
    needs more variants raises an error: otherwise it would run in eager mode and be timed as compiled.
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
    """Run the models with ONNX Runtime on the CPU, with as many threads as PyTorch.

    Each written file is first checked: its outputs must equal the model's.
    """
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
"""The back ends by name."""


def _call(model: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    return lambda: model(*args, **kwargs)


def _session_call(session: Any, inputs: Mapping[str, Any]) -> Call:
    return lambda: session.run(None, inputs)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Hide warnings inside the block. Real failures of the compiler are exceptions, and pass through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
