from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import CalibrationError, SettingError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group
from secateur.graph.trace import trace
from secateur.signals import Magnitude, Signal, Taylor, Wasserstein, score
from secateur.signals.memory import in_bytes, passes
from secateur.signals.onepass import OnePass
from secateur.signals.program import CapturedModel
from secateur.signals.registry import SIGNALS
from tests.helpers.models import build
from tests.signals.data import labelled

SMALL = Wasserstein(projections=3, per_class=4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (7, 7),
        ("7", 7),
        ("7 B", 7),
        ("1.5kB", 1500),
        ("2 GB", 2_000_000_000),
        ("2 gib", 2**31),
        (" 1 TiB ", 2**40),
    ],
)
def test_sizes(given: Any, expected: int) -> None:
    assert in_bytes(given) == expected


@pytest.mark.parametrize("given", [0, -1, "much", "2 GB of it", "GB", "", "1e3", "2 PB", True])
def test_what_is_no_size(given: Any) -> None:
    with pytest.raises(SettingError, match=f"memory: expected a number of bytes or a size .* got {given!r}"):
        in_bytes(given)


class Holding(Signal):
    """Says that it holds so many bytes for the groups, in turn."""

    name = "holding"
    needs = frozenset({"activations"})

    def __init__(self, held: list[int]) -> None:
        self._held = held

    def held(self, graph: Graph, classes: int) -> dict[str, int]:
        return {group.name: self._held[int(group.name)] * classes for group in graph.groups}

    def start(self, context: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    groups: tuple[Group, ...]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(50, 200))
def test_groups_are_taken_in_order_as_long_as_they_fit(held: list[int], limit: int) -> None:
    graph: Any = Groups(tuple(Group(str(i), 2, (), (), True) for i in range(len(held))))
    light, heavy = Taylor(), Holding(held)
    planned = passes(graph, [light, heavy, Magnitude()], limit, classes=1)
    assert planned[0]["taylor"] == planned[0]["magnitude"] == graph.groups
    if not any(held):
        assert planned == [dict.fromkeys(("taylor", "holding", "magnitude"), graph.groups)]
        return
    assert [group for one in planned for group in one["holding"]] == list(graph.groups)
    assert all(set(one) == {"holding"} for one in planned[1:])
    taken = [sum(held[int(group.name)] for group in one["holding"]) for one in planned]
    assert all(total <= limit for total in taken)
    for total, following in zip(taken, planned[1:], strict=False):
        assert total + held[int(following["holding"][0].name)] > limit


def test_a_group_that_does_not_fit_is_named() -> None:
    data = labelled("plain")
    graph = trace(build("plain"), data[0][0])
    message = r"memory: expected at least 1680 bytes, which wasserstein .* group 0\.0, got 1679"
    with pytest.raises(SettingError, match=message):
        score(graph, data, SMALL, memory=1679)


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_the_scores_are_those_of_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(name)
    graph = trace(build(name), data[0][0])
    heavy = (SMALL, *(SIGNALS[name]() for name in ("reconstruction", "fluctuation", "wanda")))
    signals = (*heavy, *(signal for signal in SIGNALS if signal not in {each.name for each in heavy}))
    whole = score(graph, data, signals)
    runs, backwards = [], []
    call, grad = CapturedModel.__call__, torch.autograd.grad
    monkeypatch.setattr(CapturedModel, "__call__", lambda *a, **k: runs.append(1) or call(*a, **k))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or grad(*a, **k))
    largest = max(sum(signal.held(graph, 5)[group.name] for signal in heavy) for group in graph.groups)
    chunked = score(graph, data, signals, memory=largest)
    assert len(runs) >= 2 * len(data)
    assert len(backwards) == len(data)  # the first pass alone needs gradients
    assert (chunked.samples, chunked.classes) == (whole.samples, whole.classes)
    for signal in whole.signals:
        assert list(chunked[signal]) == list(whole[signal])
        for group, vector in whole[signal].items():
            assert chunked[signal][group].tobytes() == vector.tobytes(), (signal, group)


def test_what_is_held_stays_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled("residual", (20, 30, 40), dtype=torch.float32)
    graph = trace(build("residual", torch.float32), data[0][0])
    held: list[int] = []
    run = OnePass.run

    def watched(one: OnePass, batch: Any) -> Any:
        step = run(one, batch)
        states = one.states()["wasserstein"]
        held.append(sum(t.nbytes for name, t in states.items() if name.startswith("projected")))
        return step

    monkeypatch.setattr(OnePass, "run", watched)
    score(graph, data, SMALL)
    largest = max(SMALL.held(graph, 5).values())
    assert max(held) > 2 * largest
    for limit in (largest, 2 * largest):
        held.clear()
        score(graph, data, SMALL, memory=limit)
        assert limit // 2 < max(held) <= limit


def test_labels_are_needed_for_the_classes_alone() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    graph = trace(build("mlp"), x)
    score(graph, [x], "activation", memory="1 kB")
    with pytest.raises(CalibrationError, match="signal wasserstein: calibration batch 0: expected labels"):
        score(graph, [x], memory="1 kB")
