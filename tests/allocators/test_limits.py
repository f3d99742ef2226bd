from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.allocators import Limits
from secateur.errors import NothingToPruneError, SettingError
from tests.allocators.fake import FakeGraph

limits_ = st.builds(
    Limits,
    round_to=st.integers(1, 9),
    min_keep=st.integers(1, 9),
    max_ratio=st.sampled_from([0.0, 0.25, 0.29, 0.5, 0.75, 0.99]),
)


def allowed_by_the_words(limits: Limits, size: int, k: int) -> bool:
    """The definition, one clause a line, in exact arithmetic."""
    kept = size - k
    return k == 0 or (
        kept % limits.round_to == 0
        and kept >= limits.min_keep
        and k <= Fraction(str(limits.max_ratio)) * size
    )


@given(limits_, st.integers(1, 120))
def test_feasible_counts_are_those_of_the_definition(limits: Limits, size: int) -> None:
    expected = [k for k in range(1, size + 1) if allowed_by_the_words(limits, size, k)]
    assert limits.feasible(size).tolist() == expected


@given(limits_, st.integers(1, 60), st.integers(0, 70))
def test_the_largest_feasible_count_not_above_the_one_wanted(limits: Limits, size: int, k: int) -> None:
    candidates = [j for j in range(min(k, size) + 1) if allowed_by_the_words(limits, size, j)]
    assert limits.removable(size, k) == max(candidates)
    assert limits.removable(size, k) <= limits.removable(size, k + 1) <= limits.allowed(size)


def test_kept_counts_are_rounded_up() -> None:
    limits = Limits(round_to=8)
    assert [limits.removable(20, k) for k in (1, 3, 4, 11, 12, 19)] == [0, 0, 4, 4, 12, 12]
    assert limits.removable(64, 1) == 0
    assert limits.allowed(7) == 0  # fewer units than the multiple: the whole group stays


def test_the_defaults_are_those_of_the_paper() -> None:
    assert Limits().allowed(100) == 99
    assert Limits().allowed(99) == 98  # 98.01
    assert Limits().allowed(1) == 0


def test_a_ratio_means_what_a_person_writes() -> None:
    assert 0.29 * 100 < 29  # the trap
    assert Limits(max_ratio=0.29).allowed(100) == 29
    assert Limits(max_ratio=0.25).allowed(16) == 4
    assert Limits(max_ratio=1 / 3).allowed(3) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"round_to": 0}, r"limits: expected round_to .* at least 1, got 0"),
        ({"round_to": True}, r"round_to .* got True"),
        ({"round_to": 8.0}, r"round_to .* got 8\.0"),
        ({"min_keep": -1}, r"limits: expected min_keep .* got -1"),
        ({"max_ratio": 1.0}, r"limits: expected max_ratio in \[0, 1\), got 1\.0"),
        ({"max_ratio": -0.1}, r"max_ratio in \[0, 1\), got -0\.1"),
        ({"max_ratio": float("nan")}, r"max_ratio in \[0, 1\), got nan"),
        ({"max_ratio": "half"}, r"max_ratio in \[0, 1\), got 'half'"),
        (
            {"ignore": "layer*"},
            r"limits: expected ignore to be a tuple of patterns or modules, got 'layer\*'",
        ),
        ({"ignore": (3,)}, r"ignore to be a tuple of patterns or modules, got \(3,\)"),
    ],
)
def test_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Limits(**setting)


def test_numpy_numbers_are_numbers() -> None:
    limits = Limits(round_to=np.int64(4), max_ratio=np.float32(0.5))  # type: ignore[arg-type]
    assert limits == Limits(round_to=4, max_ratio=0.5)
    assert type(limits.round_to) is int
    assert type(limits.max_ratio) is float


def test_ignored_groups() -> None:
    groups = FakeGraph([4, 5, 6]).groups
    assert [g.name for g in Limits(ignore=("layer[02]",)).considered(groups)] == ["layer1"]
    assert Limits(ignore=["layer1"]).ignore == ("layer1",)  # type: ignore[arg-type]


def test_a_pattern_that_matches_nothing_names_the_groups() -> None:
    with pytest.raises(
        SettingError, match=r"got 'Layer1', which matches none. Choose among 'layer0', .* and 4 more"
    ):
        Limits(ignore=("layer0", "Layer1")).considered(FakeGraph([4] * 12).groups)


def test_nothing_left_to_decide_on() -> None:
    with pytest.raises(NothingToPruneError, match="all 2 groups ignored"):
        Limits(ignore=("*",)).considered(FakeGraph([4, 5]).groups)
    with pytest.raises(NothingToPruneError, match="got no group at all"):
        Limits().considered(())


def network() -> nn.Module:
    """Two layers that are added, so that their units go together, and two more."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.block = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
            self.last = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            result: Tensor = self.last(x + self.block(x))
            return result

    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (("block.2",), ["block.0", "last.0"]),  # a layer whose units another one produces as well
        (("block",), ["last.0"]),
        (("*.0",), ["first"]),
        (("first",), ["block.0", "last.0"]),
    ],
)
def test_layers_stand_for_the_groups_that_they_produce(ignore: tuple[str, ...], left: list[str]) -> None:
    graph = sc.trace(network(), torch.zeros(2, 4))
    assert {g.name for g in graph.groups} == {"first", "block.0", "last.0"}
    assert [g.name for g in Limits(ignore=ignore).considered(graph.groups)] == left


def test_modules_are_named_where_the_model_is_known() -> None:
    model: Any = network()
    graph = sc.trace(model, torch.zeros(2, 4))
    scores = sc.score(graph, None, "magnitude")
    plan = sc.Uniform(ratio=0.5).allocate(graph, scores, limits=Limits(ignore=(model.block[0], "fir*")))
    assert [(g.name, g.kept) for g in plan.groups if g.removed] == [("last.0", 3)]
    settings: Any = plan.settings["limits"]
    assert settings["ignore"] == ["block.0", "fir*"]
    plan = sc.Uniform(ratio=0.5).allocate(graph, scores, limits=Limits(ignore=(model.last[0],)))
    assert [(g.name, g.kept) for g in plan.groups if g.removed] == [("first", 4), ("block.0", 3)]


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_prune_takes_modules(granularity: Any) -> None:
    model: Any = network()
    data = [(torch.randn(8, 4), torch.arange(8) % 2) for _ in range(5)]
    result = sc.prune(
        model,
        data,
        sc.Budget(sparsity=0.2) if granularity == "weight" else sc.Budget(macs=0.9),
        "uniform",
        granularity,
        repair=None,
        limits=Limits(ignore=(model.block,), max_ratio=0.9),
        measure_latency=False,
        progress=False,
    )
    assert all(layer.kept == layer.total for layer in result.report.layers if "block" in layer.group)
    assert any(layer.kept < layer.total for layer in result.report.layers)


def test_a_module_of_another_model_is_refused() -> None:
    graph = sc.trace(network(), torch.zeros(2, 4))
    scores = sc.score(graph, None, "magnitude")
    other: Any = network()
    for module in (other.block, nn.ReLU()):
        with pytest.raises(SettingError, match="limits: expected modules of the model that is pruned"):
            sc.Uniform(ratio=0.5).allocate(graph, scores, limits=Limits(ignore=(module,)))
    with pytest.raises(SettingError, match="no model to find it in"):
        Limits(ignore=(other.block,)).considered(graph.groups)
