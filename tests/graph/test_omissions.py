"""What a trace need not run: sizes at which code only leaves calls out, and large pictures again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.graph.executionpath import ExecutionPath

Body = Callable[[Tensor, bool], Tensor]


class Net(nn.Module):
    """Asks whether there is one sample."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.up, self.mid, self.out = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 6] to [batch, length, 3]."""
        return self.out(self.mid(self.body(self.up(x).relu(), x.shape[0] == 1)).relu())


def attention(h: Tensor, single: bool) -> Tensor:
    heads = h.unflatten(-1, (4, 3)).transpose(1, 2)
    if not single:
        heads = heads.neg().neg()
    mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=False)
    return mixed.transpose(1, 2).flatten(-2)


BODIES: dict[str, tuple[Body, bool]] = {
    "an expansion to the same size": (lambda h, single: h if single else h.expand(h.shape), False),
    "a mask of zeros": (lambda h, s: h if s else h + torch.zeros(len(h), h.shape[1], 1).to(h), False),
    "attention": (attention, False),
    "an activation": (lambda h, single: h if single else h.tanh(), True),
    "a roll": (lambda h, single: h if single else h.roll(1, -1), True),
    "another call": (lambda h, single: h.softmax(-1) if single else h, True),
    "another switch": (lambda h, single: h.sort(-1, descending=single).values if single else h, True),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_size_that_only_leaves_calls_out_is_captured_if_they_matter(name: str) -> None:
    torch.manual_seed(0)
    body, matters = BODIES[name]
    model, x = Net(body).double().eval(), torch.randn(3, 5, 6).double()
    graph = sc.trace(model, x)
    single = [v for v in graph.views if len(v.arguments[0][0]) == 1]
    assert bool(single) == matters
    keep = {g.name: np.arange(g.size) % 3 != 1 for g in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="every third")
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    for given in (x, x[:1], torch.randn(4, 2, 6).double()):
        torch.testing.assert_close(small(given), masked(given))


def test_calls_are_told_apart_by_their_switches() -> None:
    x = torch.randn(2, 3)
    with ExecutionPath(nn.Module()) as up:
        x.sort(-1, descending=False)
    with ExecutionPath(nn.Module()) as down:
        x.sort(-1, descending=True)
    assert {k[3:] for k in up.calls_with_switches} == {(False,)}
    assert {k[3:] for k in down.calls_with_switches} == {(True,)}


def test_training_is_told_apart_on_the_same_values() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(20, 12), nn.Linear(12, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            h = self.table(ids)
            return self.out(h if mask.all() else h * mask[..., None])

    torch.manual_seed(0)
    inputs = torch.randint(0, 20, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    assert sc.trace(Masked().eval(), inputs).inputs.training is False


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 12, 3, 4)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width] to [batch, 4]."""
        return self.out(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


def test_large_pictures_are_run_once_at_their_size() -> None:
    torch.manual_seed(0)
    seen = np.zeros(2)  # a trace puts lists back

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(args[0], torch._subclasses.FakeTensor):
            shape = [int(n) for n in args[0].shape]  # the search follows comparisons of sizes
            seen[:] += shape[1:] == [3, 512, 512], math.prod(shape)

    model, x = Pictures().eval(), torch.randn(2, 3, 512, 512)
    model.a.register_forward_hook(note)
    graph = sc.trace(model, x)
    assert [(axis.size, axis.other) for axis in graph.inputs.open] == [(2, 3), (512, 129), (512, 171)]
    assert seen[0] == 1
    assert seen[1] < 2.5 * x.numel()


@pytest.mark.parametrize("side", ["height", "width"])
def test_small_sizes_are_still_found_in_large_pictures(side: str) -> None:
    class Folded(Pictures):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.a(F.pad(x, (4, 4, 4, 4)))).relu()
            size = x.shape[2 if side == "height" else 3]
            return self.out(self.b(h.roll(1, 1) if int(size) < 3 else h).relu().mean((2, 3)))

    torch.manual_seed(0)
    spec = sc.trace(Folded().eval(), torch.randn(2, 3, 512, 512)).inputs
    axis = 1 if side == "height" else 2
    assert any(sizes[axis] < 3 for sizes in spec.joint) or spec.open[axis].further[0] < 3


def test_a_size_of_one_axis_is_said_of_that_axis_alone_in_large_pictures() -> None:
    class Single(Pictures):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.a(x)).relu()
            if x.shape[0] > 1:
                h = h.neg().neg()
            return self.out(self.b(h).relu().mean((2, 3)))

    torch.manual_seed(0)
    graph = sc.trace(Single().eval(), torch.randn(2, 3, 512, 512))
    batch = graph.inputs.open[0]
    assert (batch.further, graph.inputs.joint) == ((1,), ())
    assert not graph.views
