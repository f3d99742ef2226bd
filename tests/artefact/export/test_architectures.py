"""A pruned ResNet-20, a small ViT and a small Llama in every format, and where their code is unknown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from benchmarks import resnet20
from tests.targets.units.plans import random_plan
from tests.zoo.transformers_models import MODELS

RELOAD = """
import sys, torch
inputs = torch.load("inputs.pt")
found = torch.export.load("small.pt2").module()(*inputs["args"], **inputs["kwargs"])
wanted = [m for m in sys.modules if m.split(".")[0] in ("secateur", "transformers", "timm", "benchmarks")]
assert not wanted, wanted
leaves = torch.utils._pytree.tree_leaves(found)
torch.save([v for v in leaves if isinstance(v, torch.Tensor)], "outputs.pt")
"""


def example(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if name == "resnet20":
        return resnet20.make(), (torch.randn(4, 3, 32, 32),), {}
    entry = next(entry for entry in MODELS if entry.name == name)
    if not entry.available():
        pytest.skip("transformers is not installed")
    return entry.construct().eval(), (), dict(entry.example(2, torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["auto", "graph"])
@pytest.mark.parametrize("name", ["resnet20", "vit", "llama"])
def test_onnx_and_pt2(tmp_path: Path, name: str, form: Any) -> None:
    pytest.importorskip("onnxscript")
    model, args, kwargs = example(name)
    graph = sc.trace(model, kwargs or args)
    small = sc.apply(model, random_plan(graph), form, graph=graph, example_inputs=kwargs or args)
    batch = 4 if name == "resnet20" else 2
    done = sc.export(small, tmp_path / "small.onnx", kwargs or args)
    assert (done.runtime, done.batches) == ("onnxruntime", (batch, batch + 1))
    sc.export(small, tmp_path / "small.pt2", kwargs or args)
    torch.save({"args": args, "kwargs": kwargs}, tmp_path / "inputs.pt")
    child = subprocess.run(
        [sys.executable, "-c", RELOAD], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(small(*args, **kwargs))
    tensors = [v for v in wanted if isinstance(v, torch.Tensor)]
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), tensors, rtol=1e-4, atol=1e-5)
