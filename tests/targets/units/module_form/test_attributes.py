"""Attributes of PyTorch's layers tell the sizes of the smaller tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.targets.units.plans import random_plan


class Cell(nn.Module):
    """A cell that is given its state at trace."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.before, self.state, self.cell = nn.Linear(4, 9), nn.Linear(5, 12), kind(9, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        state = self.state(state)
        after = self.cell(self.before(x), (state, state) if isinstance(self.cell, nn.LSTMCell) else state)
        return self.head(after[0] if isinstance(after, tuple) else after)


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.RNNCell, nn.LSTMCell])
def test_a_cell_starts_from_zeros_of_its_own_size(kind: type[nn.Module]) -> None:
    model, x, state = Cell(kind).double().eval(), torch.randn(2, 4).double(), torch.randn(2, 5).double()
    graph = sc.trace(model, (x, state))
    cell = sc.apply(model, random_plan(graph), "module", graph=graph).cell
    assert (cell.hidden_size, cell.input_size) == (cell.weight_hh.shape[1], cell.weight_ih.shape[1])
    assert cell.input_size < 9
    assert cell.hidden_size < 12
    cell(torch.randn(2, cell.input_size).double())  # without a state, which the trace had


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.left = nn.EmbeddingBag(20, 8), nn.Linear(4, 9)
        self.pair, self.head = nn.Bilinear(8, 9, 7), nn.Linear(7, 2)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.head(self.pair(self.bag(ids), self.left(x)))


def test_bags_and_bilinear_layers_tell_their_sizes() -> None:
    model, inputs = Pair().double().eval(), (torch.randint(0, 20, (2, 5)), torch.randn(2, 4).double())
    graph = sc.trace(model, inputs)
    small = sc.apply(model, random_plan(graph), "module", graph=graph)
    assert (small.bag.num_embeddings, small.bag.embedding_dim) == tuple(small.bag.weight.shape)
    pair = small.pair
    assert (pair.out_features, pair.in1_features, pair.in2_features) == tuple(pair.weight.shape)
    assert pair.weight.numel() < 7 * 8 * 9
