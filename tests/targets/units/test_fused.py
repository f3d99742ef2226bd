"""Batch norms that a pruned module's layers take in later, as many libraries do before they predict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import secateur as sc
from tests.targets.units.test_held import pruned


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
    """Convolutions side by side that one can stand for, as RepVGG has them."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(inputs, width, 3, padding=1), nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.wide(x) + self.narrow(x)).relu()

    def merge(self, weight: float = 1) -> None:
        self.conv = copy.deepcopy(self.wide)
        self.conv.weight = nn.Parameter(self.wide.weight + weight * F.pad(self.narrow.weight, (1, 1, 1, 1)))
        self.conv.bias = nn.Parameter(self.wide.bias + self.narrow.bias)  # type: ignore[operator]
        del self.wide, self.narrow
        self.forward = self.forward_merged  # type: ignore[method-assign]

    def forward_merged(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@pytest.mark.parametrize("right", [True, False])
def test_branches_that_become_one_layer(right: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).double()
    model = nn.Sequential(Branched(3, 12), Branched(12, 9), nn.Conv2d(9, 4, 1)).double().eval()
    small, masked = pruned(model, of=x)
    for network in (small, masked):
        for block in network[:2]:
            block.merge(1 if right else 2)
    for given in (x, torch.randn(3, 3, 10, 6).double()):
        if right:
            torch.testing.assert_close(small(given), masked(given))
        else:
            with pytest.raises(sc.InputError, match="may need units that were removed"):
                small(given)
