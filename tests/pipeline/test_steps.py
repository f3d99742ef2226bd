"""Pruning in rounds, against the rounds made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import SettingError
from secateur.pipeline.steps import budget_after
from tests.targets.experts.models import library, make, words


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(20, 6, generator=rng), torch.arange(20) % 3) for _ in range(10)]


def test_two_rounds_are_those_made_by_hand() -> None:
    model, rule = net(), sc.RepairAware()
    budget = sc.Budget(params=0.3)
    found = sc.prune(
        model, data(), budget, rule, repair="reconstruct", steps=2, measure_latency=False, progress=False
    )
    fit, _ = sc.Calibration.of(data()).split()
    graph = sc.trace(model, data()[0][0])
    first = rule.allocate(
        graph, sc.score(graph, fit, rule.signals, progress=False), budget_after(1, 2, budget, graph)
    )
    small = sc.repair(sc.apply(model, first), model, fit, "reconstruct", progress=False)
    now = sc.trace(small, data()[0][0])
    left = sc.Budget(params=int(0.3 * graph.cost().params))
    second = rule.allocate(now, sc.score(now, fit, rule.signals, progress=False), left)
    assert first.predicted.params > second.predicted.params
    kept = {g.name: [u for u in range(g.size) if u not in g.removed] for g in first.groups}
    for group, more in zip(found.plan.groups, second.groups, strict=True):
        expected = [u for k, u in enumerate(kept[group.name]) if k not in more.removed]
        assert [u for u in range(group.size) if u not in group.removed] == expected
        assert more.removed  # or the test would say little
    assert found.plan.predicted == second.predicted
    assert found.plan.dense == first.dense
    assert sum(p.numel() for p in found.model.parameters()) == second.predicted.params
    assert found.plan.settings["steps"] == 2
    assert found.report.asked["steps"] == 2
    assert found.report.asked["budget"] == {"params": 0.3}
    assert found.report.proof["difference"] <= 1e-9


@pytest.mark.parametrize("family", ["plain", "mixtral", "deepseek"])
def test_two_rounds_of_experts_are_those_made_by_hand(family: str) -> None:
    if family != "plain":
        library()
    model, batches = make(family), [words(4, seed=seed) for seed in range(5)]
    rule = sc.Global(removal="reap")
    budget = sc.Budget(experts=0.5)
    found = sc.prune(model, batches, budget, rule, "expert", steps=2, measure_latency=False, progress=False)
    fit, _ = sc.Calibration.of(batches).split()
    graph = sc.trace(model, batches[0], granularity="expert")
    part = budget_after(1, 2, budget, graph)
    whole = graph.cost().experts
    assert part.experts == int(whole * 0.5**0.5)
    first = rule.allocate(graph, sc.score(graph, fit, rule.signals, progress=False), part)
    small = sc.repair(sc.apply(model, first, graph=graph), model, fit, graph=graph, progress=False)
    now = sc.trace(small, batches[0], granularity="expert")
    missing = sum(g.kept for g in first.groups if g.name not in {block.name for block in now.blocks})
    left = sc.Budget(experts=whole // 2 - missing)
    second = rule.allocate(now, sc.score(now, fit, rule.signals, progress=False), left)
    more = {group.name: group for group in second.groups}
    assert any(group.removed for group in second.groups)
    for group, decided in zip(first.groups, found.plan.groups, strict=True):
        kept = [unit for unit in range(group.size) if unit not in group.removed]
        gone = {kept[k] for k in more[group.name].removed} if group.name in more else set()
        assert set(decided.removed) == {*group.removed, *gone}
    assert sum(group.kept for group in found.plan.groups) <= whole // 2
    assert found.plan.settings["steps"] == 2
    assert found.plan.granularity == "expert"
    assert found.report.proof["difference"] <= 1e-9


def test_budgets_of_the_rounds_fall_geometrically_to_the_one_asked_for() -> None:
    graph = sc.trace(net(), data()[0][0])
    dense = graph.cost()
    shares = [budget_after(k, 4, sc.Budget(macs=0.5), graph).macs / dense.macs for k in range(1, 5)]  # type: ignore[operator]
    assert shares == pytest.approx([0.5 ** (k / 4) for k in range(1, 5)], abs=1 / dense.macs)
    assert budget_after(4, 4, sc.Budget(macs=100, params=200), graph) == sc.Budget(macs=100, params=200)


def test_auto_chooses_the_rule_and_every_round_takes_it() -> None:
    found = sc.prune(
        net(), data(), sc.Budget(macs=0.5), steps=3, repair=None, measure_latency=False, progress=False
    )
    assert found.plan.predicted.macs <= 0.5 * found.plan.dense.macs
    assert found.report.selection is not None


def test_what_cannot_be() -> None:
    for wrong in ({"steps": 0}, {"steps": 2, "budget": None}, {"steps": 2, "granularity": "weight"}):
        with pytest.raises(SettingError, match=r"at least 1 round|steps=2.* with granularity 'weight'"):
            sc.prune(net(), data(), **{"budget": sc.Budget(macs=0.5), **wrong})  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="budget of macs"):
        sc.prune(net(), data(), sc.Budget(latency=0.5), "uniform", steps=2, progress=False)
