"""Batch norms that a pruned module's layers take in later, as many libraries do before they predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import secateur as sc
from tests.targets.units.later_calls.test_callcheck import pruned


class Block(nn.Module):
    """A convolution with its batch norm, as ultralytics has it."""

    def __init__(self, inputs: int, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, padding=1, groups=groups, bias=False)
        self.bn, self.act = nn.BatchNorm2d(width), nn.SiLU()
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Net(nn.Module):
    """Two branches side by side, one with a group for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = Block(3, 12), Block(12, 12), Block(12, 12)
        self.deep, self.join = Block(12, 12, groups=12), Block(24, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width] to [batch, 4]."""
        h = self.stem(x)
        left, right = self.left(h), self.deep(self.right(h))
        return self.head(self.join(torch.cat([left, right], 1)).mean((2, 3)))


def fuse(model: nn.Module, way: str) -> None:
    for block in model.modules():
        if isinstance(block, Block):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            if way == "removed":
                del block.bn
                block.forward = block.forward_fuse  # type: ignore[method-assign]
            else:
                block.bn = nn.Identity()  # type: ignore[assignment]


def networks() -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).double()
    return *pruned(Net().double().eval(), of=x), x


@pytest.mark.parametrize("way", ["removed", "replaced"])
def test_a_module_can_be_fused_as_the_dense_one(way: str) -> None:
    small, masked, x = networks()
    for model in (small, masked):
        fuse(model, way)
    for given in (x, torch.randn(3, 3, 10, 6).double()):
        torch.testing.assert_close(small(given), masked(given))


def test_a_fused_module_still_refuses_other_code_that_reads_what_was_cut() -> None:
    small, _, x = networks()
    fuse(small, "removed")
    small(x)
    small.left.act = nn.Softmax(1)
    with pytest.raises(sc.InputError, match="may need units that were removed"):
        small(x)


def test_layers_that_change_places_are_refused() -> None:
    """Their weights read other units, though as many."""
    small, _, x = networks()
    assert small.left.conv.weight.shape == small.right.conv.weight.shape
    small.deep.forward = small.left.forward
    with pytest.raises(sc.InputError, match="may need units that were removed"):
        small(x)


class Branched(nn.Module):
    """Layers side by side that one can stand for, as RepVGG and YOLO have them.

    With the layers, batch norms go in too. `change` is what the code does with the result.
    """

    def __init__(self, inputs: int, width: int, groups: int = 1) -> None:
        super().__init__()
        self.wide = Block(inputs, width, groups)
        self.narrow = Block(inputs, width, groups)
        self.wide.act = self.narrow.act = nn.Identity()  # type: ignore[assignment]
        self.narrow.conv = nn.Conv2d(inputs, width, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(width) if inputs == width else None
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.wide(x) + self.narrow(x) + (0 if self.norm is None else self.norm(x)))

    def merge(self, name: str, weight: float = 1, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Put one convolution, of this name, in place of all. `weight`: of the narrow branch."""
        one, other = (fuse_conv_bn_eval(b.conv, b.bn) for b in (self.wide, self.narrow))
        kernel = one.weight + weight * F.pad(other.weight, (1, 1, 1, 1))
        bias = one.bias + other.bias
        if self.norm is not None:  # as a convolution that returns what it gets
            rows = torch.arange(kernel.shape[0])
            scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()  # type: ignore[operator]
            kernel = kernel.clone()
            kernel[rows, rows if kernel.shape[1] > 1 else 0, 1, 1] += scale
            bias = bias + self.norm.bias - self.norm.running_mean * scale
        one.weight, one.bias = nn.Parameter(kernel.detach()), nn.Parameter(bias.detach())
        self.norm = None
        del self.wide, self.narrow
        setattr(self, name, one)
        self.forward = lambda x: self.act((change or (lambda h: h))(one(x)))  # type: ignore[method-assign]


def branched() -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).double()
    blocks = Branched(3, 12), Branched(12, 12), Branched(12, 12, groups=12), Branched(12, 9)
    return *pruned(nn.Sequential(*blocks, nn.Conv2d(9, 4, 1)).double().eval(), of=x), x


@pytest.mark.parametrize("name", ["conv", "wide", "merged"])
@pytest.mark.parametrize("weight", [1, 2])
def test_branches_that_become_one_layer(name: str, weight: float) -> None:
    """With other weights too: the user's layer is right where it would be in the masked network."""
    small, masked, x = branched()
    for network in (small, masked):
        for block in network[:4]:
            block.merge(name, weight)
    for given in (x, torch.randn(3, 3, 10, 6).double()):
        torch.testing.assert_close(small(given), masked(given))


@pytest.mark.parametrize(
    "change", [lambda h: h.flip(1), lambda h: h.softmax(1), lambda h: h - h.mean(1, keepdim=True)]
)
def test_one_layer_for_branches_does_not_hide_what_the_code_does_with_units(change: Any) -> None:
    small, _, x = branched()
    small[1].merge("conv", change=change)
    with pytest.raises(sc.InputError, match="may need units that were removed"):
        small(x)


class Pair(nn.Module):
    """Returns one of two results, of different groups and as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
        self.first = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, two = self.one(x), self.two(x)
        return (one, two) if self.first else (two, one)


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.left, self.right = Pair(), nn.Conv2d(12, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.pair(x)
        return self.left(one.relu()) + self.right(two.relu()).tanh()


def test_results_of_a_module_that_change_places_are_refused() -> None:
    """They have as many units, but not the same ones."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).double()
    model = Taken().double().eval()
    graph = sc.trace(model, x)
    keep = {g.name: np.arange(g.size) % 3 != number for number, g in enumerate(graph.groups)}
    assert len(keep) == 2
    small = sc.apply(model, sc.Plan.build(graph, keep, allocator="by hand"), "module", graph=graph)
    small.pair.first = False
    with pytest.raises(sc.InputError, match="needs units that were removed"):
        small(x)
