"""`torch.compile` and ONNX Runtime run a pruned ResNet-20, a small ViT and a small Llama, and equal them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measure.latency.backends import BACKENDS
from tests.artefact.export.test_architectures import example
from tests.targets.units.plans import random_plan


def outputs(found: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(found)
    return [torch.as_tensor(v) for v in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "compile", "onnxruntime"])
@pytest.mark.parametrize("name", ["resnet20", "vit", "llama"])
def test_pruned_architectures(name: str, backend: str) -> None:
    if backend == "onnxruntime":
        pytest.importorskip("onnxscript")
    model, args, kwargs = example(name)
    graph = sc.trace(model, kwargs or args)
    plan = random_plan(graph)
    forms = [
        sc.apply(model, plan, form, graph=graph, example_inputs=kwargs or args) for form in ("auto", "graph")
    ]
    with torch.no_grad():
        wanted = [v for v in outputs(model(*args, **kwargs)) if isinstance(v, torch.Tensor)]
    small = [outputs(form(*args, **kwargs)) for form in forms]
    with BACKENDS[backend]([model, *forms], args, kwargs) as calls:
        for call, expected in zip(calls, [wanted, *small], strict=True):
            torch.testing.assert_close(outputs(call()), expected, rtol=1e-3, atol=1e-4)


def test_onnxruntime_computes_what_the_model_computes() -> None:
    pytest.importorskip("onnxscript")
    models = [nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 2)).train() for n in (8, 5)]
    x, tiny = torch.randn(3, 4), torch.tensor(torch.finfo(torch.float32).tiny)
    with BACKENDS["onnxruntime"](models, (x,), {}) as calls:
        for model, call in zip(models, calls, strict=True):
            torch.testing.assert_close(outputs(call())[0], model(x).detach(), rtol=1e-4, atol=1e-6)
    assert all(model.training for model in models)
    assert float(tiny * 0.5) > 0  # a session may flush subnormals, but not from then on
