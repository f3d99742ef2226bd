from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.integrations.optimizers import carry, moves
from secateur.integrations.replacing import replace_parameters
from tests.integrations.training import batches, network, step
from tests.targets.units.plans import random_plan

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p),
}


def pruned(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[sc.Plan, tuple[str, ...]]:
    graph = sc.trace(model, batches()[0][0])
    plan = random_plan(graph, 0.4)
    before = dict(model.named_parameters())
    replace_parameters(model, sc.apply(model, plan, "module", graph=graph))
    return plan, carry([optimizer], moves(before, dict(model.named_parameters()), plan))


def literal(tensor: Tensor, name: str, plan: sc.Plan) -> Tensor:
    """Without the removed positions, one after another."""
    for group in plan.groups:
        for piece in group.slices:
            if piece.tensor == name:
                stays = [i for i in range(tensor.shape[piece.axis]) if i not in piece.removed]
                tensor = torch.stack([tensor.select(piece.axis, i) for i in stays], piece.axis)
    return tensor


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_cut_like_the_parameters(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for batch in batches():
        step(model, optimizer, batch)
    state = {
        n: {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
        for n, p in model.named_parameters()
    }
    plan, anew = pruned(model, optimizer)
    assert not anew
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    assert set(optimizer.state) <= set(held)
    cut = 0
    for n, p in model.named_parameters():
        for key, value in state[n].items():
            found = optimizer.state[p][key]
            if isinstance(value, Tensor) and value.ndim:
                assert torch.equal(found, literal(value, n, plan))
                assert found.shape == p.shape
                cut += found.shape != value.shape
            else:
                assert found == value
    assert cut >= 5 or name == "sgd"
    assert step(model, optimizer, batches()[0]) > 0


def test_schedulers_go_on() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(model, optimizer, batches()[0])
    schedule.step()
    pruned(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, batches()[1])
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_factored_moments_start_anew_where_parameters_shrank() -> None:
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, batches()[0])
    before = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    plan, anew = pruned(model, optimizer)
    shrunk = {s.tensor for g in plan.groups for s in g.slices if s.removed}
    assert set(anew) == {n for n in shrunk if n in before and before[n].keys() & {"row_var"}}
    assert "5.weight" in anew
    assert all(optimizer.state[p] for n, p in model.named_parameters() if n not in anew)
    step(model, optimizer, batches()[1])


def test_parameters_of_others_stay() -> None:
    model, other = network(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [
            {"params": list(model.parameters())[:2], "lr": 0.5},
            {"params": [*list(model.parameters())[2:], *other.parameters()]},
        ],
        lr=0.1,
    )
    groups: list[Any] = [group["params"] for group in optimizer.param_groups]
    pruned(model, optimizer)
    assert [group["params"] for group in optimizer.param_groups] == groups  # the very lists
    assert groups[1][-2:] == [*other.parameters()]
    assert groups[0] == list(model.parameters())[:2]
