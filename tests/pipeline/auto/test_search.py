"""Budget that is moved between groups, as measured models tell."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Calibration
from secateur.errors import BudgetError, NothingToPruneError, SettingError, UnreachableBudgetError
from secateur.pipeline.auto.choosers import CHOOSERS, chooser_of
from secateur.pipeline.targets.target import Task
from secateur.pipeline.targets.units import Units
from secateur.repairs.judging import Judge
from tests.pipeline.auto.residual import data


def prune(model: nn.Module, given: Any, **settings: Any) -> Any:
    settings = {"budget": sc.Budget(macs=0.5), "repair": "reconstruct"} | settings
    return sc.prune(model, given, measure_latency=False, progress=False, **settings)


class Amplified(nn.Module):
    """Errors of the first group are small where they arise, and large in the end.

    The second layer gives one small unit that all of the first group feeds, and five large ones that the
    first unit feeds alone. The outputs are the small unit, amplified, and a little of the others. So errors
    relative to the second layer's outputs say that the first group can go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(6))
            self.first.bias.zero_()
            self.second.weight.zero_()
            self.second.weight[0] = 0.1
            self.second.weight[1:, 0] = 30.0
            self.second.bias.copy_(torch.tensor([1.0, -20, -10, 0, 10, 20]))
            self.last.weight.copy_(
                torch.tensor([[30.0, 0.1, -0.1, 0.1, -0.1, 0.1], [0, 0.1, 0.1, 0, 0.1, 0]])
            )
            self.last.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.tanh(self.first(x)))))


def test_where_errors_do_not_add_up_the_best_of_all_plans_is_found() -> None:
    """All plans by brute force: the rule's is not the best within the budget, and the search's is."""
    torch.manual_seed(0)
    model = Amplified().eval()
    given = [torch.randn(20, 6) for _ in range(10)]
    budget = sc.Budget(macs=0.6)
    target = Units(Task(model, Calibration.of(given), repair="reconstruct"))
    scores = target.score([sc.RepairAware()])
    judge = Judge(model, target.task.held)

    def error(plan: sc.Plan) -> float:
        return float(judge(target.candidate(plan, target.task.fit)).mean())

    errors = {}
    for one, other in product(range(6), repeat=2):
        rule = sc.Ratios({"first": one / 6 + 1e-9, "second": other / 6 + 1e-9}, removal="reconstruction")
        plan = target.allocate(rule, scores, None) if one + other else None
        if plan is not None and plan.predicted.macs <= 0.6 * plan.dense.macs:
            errors[tuple(len(group.removed) for group in plan.groups)] = error(plan)
    assert len(errors) > 10
    start = target.allocate(sc.RepairAware(), scores, budget)
    choice = sc.Search().choose(target, budget)
    found = target.allocate(choice.rule, choice.scores, budget)
    assert found.predicted.macs <= 0.6 * found.dense.macs
    assert error(found) == pytest.approx(min(errors.values()), rel=1e-6)
    assert error(found) < 0.6 * error(start)


def test_the_plan_is_what_its_factors_say_and_never_worse_than_the_start(net: nn.Module) -> None:
    """By hand: repaired on all data that repairs may read, judged on those held out."""
    given, budget = data(labels=False, batches=25), sc.Budget(macs=0.5)
    result = prune(net, given, allocator=sc.Search(evaluations=12))
    choice, plan = result.report.selection, result.plan
    assert result.report.asked["allocator"] == "search"
    assert [r.samples for r in choice.rounds] == [256, 320]
    assert choice.candidates[0].verdict == "chosen"
    assert 4 < sum(1 for c in choice.candidates if c.errors) <= 12
    assert all(c.macs <= 0.5 for c in choice.candidates)
    start = next(c for c in choice.candidates if c.name == "repair_aware")
    assert len(start.errors) == 2
    assert choice.candidates[0].errors[1] <= start.errors[1]

    target = Units(Task(net, Calibration.of(given), repair="reconstruct"))
    scores = target.score([sc.RepairAware()])
    per = plan.settings["per"]
    again = sc.RepairAware(factors=plan.settings.get("factors", {}), per=per)
    assert target.allocate(again, scores, budget).groups == plan.groups
    judge = Judge(net, target.task.held)
    for candidate, one in (
        (choice.candidates[0], plan),
        (start, target.allocate(sc.RepairAware(), scores, budget)),
    ):
        by_hand = float(judge(target.candidate(one, target.task.fit)).mean())
        assert candidate.errors[1] == pytest.approx(by_hand, rel=1e-3)


def test_the_same_seed_gives_the_same_plan_and_the_log_shows_on_every_face(net: nn.Module) -> None:
    given = data(labels=False)
    one, other = (prune(net, given, allocator="search", seed=3) for _ in range(2))
    assert one.plan == other.plan
    assert one.report.selection == other.report.selection
    names = [c.name for c in one.report.selection.candidates]
    assert any(name.startswith("round 1, wave") for name in names)
    assert sc.Report.from_json(one.report.to_json()) == one.report
    for face in (str(one.report), one.report.to_markdown()):
        assert all(name in face.replace("\\", "") for name in names[:10])


def test_limits_and_other_budgets_hold(net: nn.Module) -> None:
    limits = sc.Limits(round_to=4, ignore=("stem",))
    result = prune(
        net, data(), budget=sc.Budget(params=0.6), allocator=sc.Search(evaluations=8), limits=limits
    )
    assert result.plan.predicted.params <= 0.6 * result.plan.dense.params
    assert {g.name: g.kept == g.size for g in result.plan.groups}["stem"]
    assert all(g.kept % 4 == 0 or g.kept == g.size for g in result.plan.groups)


def test_the_last_start_stays_if_nothing_is_better(net: nn.Module) -> None:
    result = prune(net, data(), allocator=sc.Search(evaluations=1))
    assert [c.name for c in result.report.selection.candidates if c.errors] == ["repair_aware"]
    plain = prune(net, data(), allocator="repair_aware")
    assert result.plan.groups == plain.plan.groups
    short = prune(net, data(), allocator=sc.Search(minutes=1e-9))
    assert short.plan.groups == plain.plan.groups


def test_rounds_of_removal_take_the_rule_that_was_found(net: nn.Module) -> None:
    result = prune(net, data(), allocator=sc.Search(evaluations=6), steps=2)
    assert result.plan.predicted.macs <= 0.5 * result.plan.dense.macs
    assert result.plan.settings["steps"] == 2


def test_starts_of_ones_own(net: nn.Module) -> None:
    starts = {"mine": sc.RepairAware(factors={"stem": 50.0}), "even": sc.RepairAware(per="params")}
    choice = prune(net, data(), allocator=sc.Search(evaluations=3, starts=starts)).report.selection
    assert {"mine", "even"} <= {c.name for c in choice.candidates}
    assert len(next(c for c in choice.candidates if c.name == "mine").errors) == len(choice.rounds)


def test_auto_searches_if_it_is_given_time(net: nn.Module) -> None:
    rules = {"even": "uniform", "global": "global"}
    result = prune(net, data(batches=25), allocator=sc.Auto(rules, minutes=0.02))
    choice = result.report.selection
    assert result.report.asked["allocator"] == "auto"
    by_name = {c.name: c for c in choice.candidates}
    assert {"even", "global", "repair_aware"} <= by_name.keys()
    alone = prune(net, data(batches=25), allocator=sc.Auto(rules)).report.selection.candidates[0].name
    assert len(by_name[alone].errors) == len(by_name["repair_aware"].errors) == len(choice.rounds)
    assert choice.candidates[0].errors[-1] <= by_name[alone].errors[-1]
    loser = by_name["even" if alone == "global" else "global"]
    assert loser.errors == ()
    assert loser.verdict.startswith("before the search: ")
    with pytest.raises(SettingError, match=r"Auto\(minutes=1\)\).*error that units leave"):
        prune(net, data(), allocator=sc.Auto(minutes=1), granularity="weight", budget=sc.Budget(sparsity=0.5))
    with pytest.raises(SettingError, match="minutes above 0"):
        sc.Auto(minutes=0)


def test_residual_streams_may_start_whole(net: nn.Module) -> None:
    choice = prune(net, data(), allocator=sc.Search(evaluations=3)).report.selection
    whole = next(c for c in choice.candidates if c.name == "repair_aware, streams whole")
    alone = prune(net, data(), allocator=sc.Auto({"x": sc.Auto().rules["repair_aware, streams whole"]}))
    assert whole.macs == alone.report.selection.candidates[0].macs


def test_what_cannot_be(net: nn.Module) -> None:
    for granularity in ("weight", "expert", ["unit", "expert"]):
        with pytest.raises(SettingError, match=r"prune\(allocator='search'\): .*error that units leave"):
            prune(net, data(), allocator="search", granularity=granularity, repair=None)
    with pytest.raises(SettingError, match=r"compare\(allocator='search'\)"):
        sc.compare(net, data(), ["search"], granularity="weight", progress=False)
    with pytest.raises(BudgetError, match="search: expected a budget, got none"):
        prune(net, data(), allocator="search", budget=None)
    with pytest.raises(UnreachableBudgetError):
        prune(net, data(), allocator="search", budget=sc.Budget(macs=1e-6))
    with pytest.raises(NothingToPruneError):
        prune(net, data(), allocator="search", limits=sc.Limits(ignore=("*",)))
    with pytest.raises(SettingError, match="evaluations of at least 1, got 0"):
        sc.Search(evaluations=0)
    with pytest.raises(SettingError, match=r"finalists of at least 1, got 2\.5"):
        sc.Search(finalists=2.5)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="minutes above 0, got -1"):
        sc.Search(minutes=-1)
    with pytest.raises(SettingError, match="starts to be RepairAware rules by name, got none"):
        sc.Search(starts={})
    with pytest.raises(SettingError, match="got Uniform"):
        sc.Search(starts={"a": sc.Uniform()})  # type: ignore[dict-item]
    with pytest.raises(SettingError, match="'search'"):
        prune(net, data(), allocator="no such rule")


def test_choosers_by_name() -> None:
    assert chooser_of("search") == sc.Search()
    assert chooser_of("auto") == sc.Auto()
    assert chooser_of(sc.Search(3)) == sc.Search(3)
    assert chooser_of(sc.RepairAware()) is None
    assert all(kind.name == name for name, kind in CHOOSERS.items())


def test_compare_takes_it_as_one_of_its_rules(net: nn.Module) -> None:
    rules = {"search": sc.Search(evaluations=4), "repair_aware": "repair_aware"}
    found = sc.compare(net, data(), rules, [sc.Budget(macs=0.6)], "reconstruct", progress=False)
    loss = {o.rule: o.repaired.loss for o in found.outcomes}
    assert loss["search"] <= loss["repair_aware"] * (1 + 1e-6)
