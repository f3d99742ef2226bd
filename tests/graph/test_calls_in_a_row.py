"""Models in which a call finds what earlier ones have left: right in every call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.targets.units.plans import random_plan

Way = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.one, self.two, self.cell = nn.Linear(6, 12), nn.Linear(12, 3), nn.GRUCell(6, 12)
        self.way, self.last = way, None
        self.table: dict[str, Tensor] = {}
        self.queue: deque[Tensor] = deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        return self.two(self.way(self, x))


def smoothed(net: Net, x: Tensor) -> Tensor:
    found = torch.relu(net.one(x))
    if net.last is not None:
        found = found + net.last.flip(-1)
    net.last = found.detach()
    return found


def recurrent(net: Net, x: Tensor) -> Tensor:
    net.last = net.cell(x, net.last)
    return net.last + net.one(x)


def in_a_table(net: Net, x: Tensor) -> Tensor:
    found, last = net.one(x), net.table.get("last")
    net.table["last"] = found.detach()
    return found if last is None else found * last.roll(2, -1)


def third_call(net: Net, x: Tensor) -> Tensor:
    net.queue.append(net.one(x).detach())
    found = torch.stack(list(net.queue)).mean(0)
    return net.one(x) + (found if len(net.queue) < 3 else found.flip(-1))


def while_training(net: Net, x: Tensor) -> Tensor:
    found = torch.relu(net.one(x))
    if net.training:
        found = found if net.last is None else found - net.last.flip(-1)
        net.last = found.detach()
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", [smoothed, recurrent, in_a_table, third_call, while_training])
def test_every_call_is_right(way: Way, training: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(way).double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    assert any(group.kept < graph[group.name].size for group in plan.groups)
    masked = sc.apply(model, plan, "masked")
    if way is in_a_table:  # by how many places a later call turns is a number that would have to change
        with pytest.raises(sc.ApplyError, match="after 3 other calls"):
            sc.apply(model, plan, "module", graph=graph)
        return
    small = sc.apply(model, plan, "module", graph=graph)
    for _ in range(5):
        x = torch.randn(4, 6).double()
        torch.testing.assert_close(small.train(training)(x), masked.train(training)(x))


class ActNorm(nn.Module):
    """Takes scale and shift from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 3)
        self.scale, self.shift = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))
        self.register_buffer("done", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        hidden = self.one(x)
        if not self.done:
            with torch.no_grad():
                self.shift.copy_(-hidden.mean(0))
                self.scale.copy_(1 / hidden.std(0))
                self.done.fill_(True)
        return self.two(torch.relu((hidden + self.shift) * self.scale))


class Normed(nn.Module):
    """The table is normed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(9, 6, max_norm=0.5), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, length] to [batch, length, 3]."""
        return self.two(torch.relu(self.one(self.table(ids))))


@pytest.mark.parametrize("case", ["first batch", "later", "table"])
def test_parameters_into_which_forward_writes_stay_the_users(case: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = Normed() if case == "table" else ActNorm()
    model = model.double().eval()
    x = torch.randint(0, 9, (4, 5)) if case == "table" else torch.randn(4, 6).double()
    if case == "later":
        model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check() -> None:
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)

    graph = sc.trace(model, x)
    check()
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    check()
    assert sc.verify(model, small, plan, x).difference < 1e-9
    check()
