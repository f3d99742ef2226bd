from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measure.latency.timing import interleaved


def test_bytes_of_weights_count_shared_storage_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    norm = 4 * 4 * 4 + 8  # weight, bias, mean, variance, and a 64-bit count
    assert sc.weight_bytes(net) == 2 * 64 + norm
    net[1].weight = net[0].weight
    assert sc.weight_bytes(net) == 64 + norm
    assert sc.weight_bytes(net.half()) == 32 + 4 * 4 * 2 + 8
    assert sc.weight_bytes(nn.ReLU()) == 0


def test_median_and_spread() -> None:
    latency = sc.Latency((5.0, 1.0, 3.0, 2.0, 4.0), batch=2)
    assert latency.median == 3.0
    assert latency.spread == (2.0, 4.0)
    assert sc.Latency((1.0,), 1).spread == (1.0, 1.0)


class Recording(nn.Module):
    def __init__(self, name: str, calls: list[tuple[str, bool, bool]]) -> None:
        super().__init__()
        self.name, self.inner = name, nn.Dropout()
        self.note = calls.append  # a list of its own would be put back with the rest of the model's state

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        self.note((self.name, self.inner.training, torch.is_grad_enabled()))
        return self.inner(x) * scale


def test_models_take_turns_in_evaluation_mode_and_come_back() -> None:
    calls: list[tuple[str, bool, bool]] = []
    first, second = Recording("a", calls), Recording("b", calls)
    second.inner.eval()
    found = sc.latency([first, second], (torch.zeros(5, 2),), {"scale": 2.0}, runs=3, warmup=1)
    assert calls == [("a", False, False), ("b", False, False)] * 4
    assert [len(f.seconds) for f in found] == [3, 3]
    assert all(f.batch == 5 and min(f.seconds) > 0 for f in found)
    assert (first.training, first.inner.training, second.training, second.inner.training) == (
        True,
        True,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("most", "rounds", "timed"),
    [(100.0, 23, 20), (46.0, 23, 20), (45.0, 21, 20), (20.0, 11, 10), (1.0, 6, 5)],
)
def test_slow_models_are_timed_in_fewer_rounds(most: float, rounds: int, timed: int) -> None:
    calls: list[str] = []

    def second_long(call: Callable[[], object]) -> float:
        call()
        return 1.0

    found = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 20, 3, second_long, most)
    assert calls == ["a", "b"] * rounds
    assert [len(times) for times in found] == [timed, timed]


def test_modes_come_back_after_a_failure() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        sc.latency([net], (torch.zeros(2, 4),))
    assert net.training


def test_costs_are_values() -> None:
    assert sc.Cost(1, 2) == sc.Cost(params=1, macs=2)
    assert hash(sc.Cost(1, 2)) == hash(sc.Cost(1, 2))
