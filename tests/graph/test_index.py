"""Reading and writing positions by index tensors: the other axes stay prunable, the indexed one does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.graph.tiny import Calls, identities, traced

FOUR = [0, 1, 2, 3]
TARGET = torch.tensor([0, 2, 2, 1, 0])


@pytest.mark.parametrize(
    "write",
    [
        lambda rows, x: rows.index_add(0, TARGET, x),
        lambda rows, x: rows.clone().index_add_(0, TARGET, x),
        lambda rows, x: rows.index_copy(0, torch.tensor([4, 2, 0, 1, 3]), x),
        lambda rows, x: rows.scatter_add(0, TARGET[:, None].expand(-1, x.shape[1]), x),
        lambda rows, x: rows.scatter_reduce(0, TARGET[:, None].expand(-1, x.shape[1]), x, "amax"),
    ],
    ids="index_add in_place index_copy scatter_add scatter_reduce".split(),
)  # fmt: skip
def test_rows_written_by_number(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = Calls(
        lambda m, x, y: m.c(write(m.a(x), m.b(y))), a=nn.Linear(3, 4), b=nn.Linear(2, 4), c=nn.Linear(4, 2)
    )
    graph = traced(net, torch.randn(5, 3), torch.randn(5, 2))
    axes = [("a.weight", 0, 4), ("b.weight", 0, 4), ("c.weight", 1, 4)]
    assert identities(graph, *axes) == [FOUR] * 3


def test_columns_written_by_number_stay() -> None:
    net = Calls(
        lambda m, x: m.c(m.a(x).index_add(1, torch.tensor([0, 3]), m.b(x))),
        a=nn.Linear(3, 4),
        b=nn.Linear(3, 2),
        c=nn.Linear(4, 5),
        d=nn.Linear(5, 2),
    )
    net.function = lambda m, x: m.d(torch.relu(m.c(m.a(x).index_add(1, torch.tensor([0, 3]), m.b(x)))))
    graph = traced(net, torch.randn(4, 3))
    assert [group.name for group in graph.groups] == ["c"]
