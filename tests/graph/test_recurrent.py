"""Recurrent layers: gates of a hidden unit go together, in every layer and direction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.graph.tiny import Calls, identities, traced

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


def tagger(kind: type[nn.RNNBase], hidden: int = 3, **settings: object) -> nn.Module:
    out = settings.get("proj_size") or hidden
    width = out * (2 if settings.get("bidirectional") else 1)
    return Calls(
        lambda m, x: m.out(m.recurrent(m.embed(x))[0]),
        embed=nn.Linear(2, 4),
        recurrent=kind(4, hidden, batch_first=True, **settings),
        out=nn.Linear(width, 2),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", GATES)
def test_gates_of_a_unit_go_together(kind: type[nn.RNNBase], bias: bool) -> None:
    graph = traced(tagger(kind, bias=bias), torch.randn(2, 5, 2))
    gates = GATES[kind]
    axes = [
        ("recurrent.weight_ih_l0", 0, 3 * gates), ("recurrent.weight_hh_l0", 0, 3 * gates),
        ("recurrent.weight_hh_l0", 1, 3), ("out.weight", 1, 3),
    ]  # fmt: skip
    assert identities(graph, *axes) == [[0, 1, 2] * gates] * 2 + [[0, 1, 2]] * 2
    assert identities(graph, ("embed.weight", 0, 4), ("recurrent.weight_ih_l0", 1, 4)) == [[0, 1, 2, 3]] * 2
    biases = {s.tensor for s in graph["recurrent"].slices if "bias" in s.tensor}
    assert biases == ({"recurrent.bias_ih_l0", "recurrent.bias_hh_l0"} if bias else set())


def test_rnn_with_another_activation() -> None:
    graph = traced(tagger(nn.RNN, nonlinearity="relu"), torch.randn(2, 5, 2))
    assert graph["recurrent"].size == 3


@pytest.mark.parametrize("kind", GATES)
def test_layers_and_directions_share_their_units(kind: type[nn.RNNBase]) -> None:
    graph = traced(tagger(kind, num_layers=2, bidirectional=True), torch.randn(2, 5, 2))
    axes = [("out.weight", 1, 6), ("recurrent.weight_ih_l1_reverse", 1, 6), ("recurrent.weight_hh_l1", 1, 3)]
    assert identities(graph, *axes) == [[0, 1, 2, 0, 1, 2]] * 2 + [[0, 1, 2]]


def test_a_projection_has_units_of_its_own() -> None:
    graph = traced(tagger(nn.LSTM, hidden=5, proj_size=3, num_layers=2), torch.randn(2, 4, 2))
    axes = [
        ("recurrent.weight_hr_l0", 0, 3), ("recurrent.weight_hr_l1", 0, 3), ("recurrent.weight_hh_l1", 1, 3),
        ("recurrent.weight_ih_l1", 1, 3), ("out.weight", 1, 3),
    ]  # fmt: skip
    assert identities(graph, *axes) == [[0, 1, 2]] * 5
    (cells,) = (left for left in graph.left if left.group.name.startswith("recurrent"))
    assert (cells.group.size, cells.reason) == (5, "no layer's output shows it")


def test_the_last_state_and_a_learnt_first_one() -> None:
    def last(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        start = m.start.expand(-1, x.shape[0], -1).contiguous()
        return m.out(m.recurrent(x, start)[1][-1])

    net = Calls(
        last,
        recurrent=nn.GRU(2, 3, batch_first=True),
        start=nn.Parameter(torch.randn(1, 1, 3)),
        out=nn.Linear(3, 2),
    )
    graph = traced(net, torch.randn(4, 5, 2))
    axes = [("recurrent.weight_hh_l0", 1, 3), ("start", 2, 3), ("out.weight", 1, 3)]
    assert identities(graph, *axes) == [[0, 1, 2]] * 3


def test_time_first_and_no_batch() -> None:
    net = Calls(lambda m, x: m.out(m.recurrent(x)[0]), recurrent=nn.LSTM(2, 3), out=nn.Linear(3, 2))
    assert traced(net, torch.randn(5, 2, 2))["recurrent"].size == 3
    assert traced(net, torch.randn(5, 2))["recurrent"].size == 3


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_single_steps(kind: type[nn.RNNCellBase]) -> None:
    def steps(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        state = m.start(x[0])
        state = (state, state) if kind is nn.LSTMCell else state
        for now in x.unbind(0):
            state = m.cell(m.into(now), state)
        return m.out(state[0] if kind is nn.LSTMCell else state)

    parts = {"start": nn.Linear(2, 3), "into": nn.Linear(2, 4), "cell": kind(4, 3), "out": nn.Linear(3, 2)}
    graph = traced(Calls(steps, **parts), torch.randn(5, 6, 2))
    axes = [("start.weight", 0, 3), ("cell.weight_hh", 1, 3), ("out.weight", 1, 3)]
    assert identities(graph, *axes) == [[0, 1, 2]] * 3
    assert identities(graph, ("into.weight", 0, 4), ("cell.weight_ih", 1, 4)) == [[0, 1, 2, 3]] * 2
