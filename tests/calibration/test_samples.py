"""Which batches can be cut into samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Batch, Calibration
from secateur.calibration.subset import take_share
from tests.helpers.lengths import Nodes

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Mixing(nn.Module):
    """Compares the samples of a batch with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x - x.mean(0))
        return out


class Adjacent(nn.Module):
    """A graph network that holds the graph itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.register_buffer("neighbours", torch.eye(6).roll(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.neighbours @ x)
        return out


class Drawing(nn.Module):
    """Adds noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x + torch.randn_like(x))
        return out


class Pair(nn.Module):
    """Two inputs, of which the second may be shared by all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + other.sum()
        return out


def edges(nodes: int, count: int) -> Tensor:
    return torch.randint(0, nodes, (2, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "raw", "whole"),
    [
        (nn.Linear(4, 5), (X, Y), False),
        (nn.Linear(4, 5), X, False),
        (nn.Linear(4, 5), (X, Y.tolist()), False),
        (nn.Linear(4, 5), (X, [{"boxes": X}] * 6), True),
        (nn.Linear(4, 5), (X, ["a text"] * 6), True),
        (nn.Linear(4, 5), (X, torch.zeros(3)), True),
        (nn.Linear(4, 5), (X, torch.tensor(1.0)), True),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), (X, Y), False),
        (Nodes(), ((X, edges(6, 11)), Y), True),
        (Nodes(), ((X, edges(6, 6)), Y), True),
        (Nodes(), ((X[:2], edges(2, 5)), Y[:2]), True),  # axes of one length by chance
        (Mixing(), (X, Y), True),
        (Adjacent(), (X, Y), True),
        (Drawing(), (X, Y), False),
        (Pair(), ((X, torch.ones(3)), Y), False),
        (Pair(), ((X, X), Y), True),
    ],
)
def test_what_is_whole_is_found_out(model: nn.Module, raw: Any, whole: bool) -> None:
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    batch = Calibration.of([raw], model=model).first()
    assert batch.whole == whole
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(batch.cut(3)) == (1 if whole else 3)
    assert batch.first(2).size == (batch.size if whole else 2)


@pytest.mark.parametrize("whole", [True, False])
def test_the_user_has_the_last_word(whole: bool) -> None:
    data = Calibration.of([(X, Y)], whole=whole, model=Mixing())
    assert data.first().whole == whole
    assert Calibration.of(Calibration.of([(X, Y)]), whole=whole).first().whole == whole


def test_an_object_of_the_users_is_whole() -> None:
    data = Calibration.of([SimpleNamespace(x=X, y=Y)] * 3, forward=lambda m, b: m(b.x), model=nn.Linear(4, 5))
    assert all(batch.whole for batch in data)


def test_labels_given_as_numbers_are_cut_with_their_samples() -> None:
    pieces = Batch.of((X, Y.tolist())).cut(3)
    assert torch.equal(torch.cat([piece.classes() for piece in pieces]), Y)


def test_graphs_are_held_out_as_they_are() -> None:
    raws = [((torch.randn(n, 4), edges(n, 2 * n)), torch.arange(n) % 3) for n in (6, 5, 7)]
    data = Calibration.of(raws, model=Nodes())
    fit, held = data.split()
    assert [[b.size for b in part] for part in (fit, held)] == [[6, 5], [7]]
    assert {b.size for b in take_share(data, 0.5)} <= {5, 6, 7}
    with pytest.raises(sc.CalibrationError, match=r"at least two batches, got 1.* cannot be cut"):
        Calibration.of(raws[:1], model=Nodes()).split()


def test_a_graph_by_itself_is_one_batch() -> None:
    data = Calibration.of(((X, edges(6, 11)), Y), model=Nodes())
    assert [(batch.size, len(batch.args)) for batch in data] == [(6, 2)]
