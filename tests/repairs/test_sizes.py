"""Repairs on batches of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Calibration
from secateur.graph.programs import Programs
from secateur.repairs.judging import Judge
from secateur.repairs.methods import REPAIRS
from secateur.repairs.sweep import sweep
from tests.helpers.lengths import batches, network
from tests.targets.units.plans import random_plan

METHODS = [name for name in REPAIRS if name not in ("batchnorm", "polish")]


def small_of(name: str, form: str = "module") -> tuple[Any, sc.Graph, Any, list[Any]]:
    """A network, its trace at the first size, what is left of it, and its batches."""
    model, data = network(name), batches(name)
    graph = sc.trace(model, Calibration.of(data, model=model).first().inputs)
    return model, graph, sc.apply(model, random_plan(graph, 0.3), form, graph=graph), data  # type: ignore[arg-type]


def apart(small: Any, model: Any, data: Calibration) -> float:
    """How far from the dense model, whatever the labels say."""
    return float(Judge(model, data)(small).mean())


@pytest.mark.parametrize("name", ["padded", "pictures", "windows", "steps", "nodes", "language"])
def test_every_method_reads_batches_of_any_size(name: str) -> None:
    model, graph, small, data = small_of(name)
    read = Calibration.of(data, model=model)
    for method in METHODS:
        copy = sc.repair(small, model, data, None)
        done = sweep(method, copy, graph, read)
        assert done
        if method == "reconstruct":
            assert apart(copy, model, read) < apart(small, model, read)


@pytest.mark.parametrize("name", ["tokens", "pictures"])
def test_one_program_of_any_size_and_one_for_each_give_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for each in (False, True):
        if each:
            monkeypatch.setattr(Programs, "_differing", lambda *args: [])
        model, graph, small, data = small_of(name)
        sweep("reconstruct", small, graph, Calibration.of(data, model=model))
        found.append((len(graph.programs), small.state_dict()))
    assert found[0][0] < found[1][0]
    for key, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], tensor, rtol=1e-9, atol=1e-11)


def test_forms_are_repaired_alike() -> None:
    model, graph, small, data = small_of("windows")
    masked = sc.apply(model, sc.record_of(small).plan, "masked", graph=graph)
    read = Calibration.of(data, model=model)
    for one in (small, masked):
        sweep("reconstruct", one, graph, read)
    for batch in read:
        torch.testing.assert_close(batch.run(masked), batch.run(small), rtol=1e-9, atol=1e-11)


def test_auto_judges_at_every_size() -> None:
    model, graph, small, data = small_of("windows")
    repaired = sc.repair(small, model, data, "auto", graph=graph, progress=False)
    read = Calibration.of(data, model=model)
    assert apart(repaired, model, read) < apart(small, model, read)


def test_a_size_of_the_batch_times_the_heads_follows_the_heads_that_stay() -> None:
    """Each sample's heads are folded into the batch axis, as in attention over a map of channels."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.heads = nn.Conv1d(6, 36, 1), nn.Conv1d(12, 3, 1), 3

        def forward(self, x: Tensor) -> Tensor:
            """[batch, 6, length] to [batch, 3, length]"""
            b, _, length = x.shape
            q, k, v = (y.reshape(b * self.heads, 4, -1) for y in self.qkv(x).chunk(3, 1))
            y = torch.softmax(q.transpose(1, 2) @ k, -1) @ v.transpose(1, 2)
            return self.out(y.transpose(1, 2).reshape(b, -1, length))

    torch.manual_seed(0)
    model, data = Attention().eval(), [torch.randn(size, 6, 7) for size in (8, 8, 8, 5)]
    graph = sc.trace(model, data[0])
    small = sc.apply(model, random_plan(graph, 0.4), "module", graph=graph)
    assert small.qkv.out_channels == 24
    better = sc.repair(small, model, data, "reconstruct", graph=graph, progress=False)
    with torch.no_grad():
        assert torch.dist(better(data[0]), model(data[0])) < torch.dist(small(data[0]), model(data[0]))
