"""Rules that compete on a small network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.calibration import Calibration
from secateur.errors import BudgetError, NothingToPruneError, SettingError, UnreachableBudgetError
from secateur.pipeline.auto.streams import streams
from secateur.repairs.judging import Judge
from secateur.repairs.sweep import sweep
from tests.pipeline.auto.residual import Net, data


def prune(model: nn.Module, given: Any, **settings: Any) -> Any:
    return sc.prune(model, given, measure_latency=False, progress=False, **settings)


def test_what_decides_by_default_is_the_best_of_its_candidates(net: nn.Module) -> None:
    """Each candidate on its own, by hand: the winner's rule gives the least error of those it beat last."""
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = prune(net, data(batches=25), budget=sc.Budget(macs=0.6))
    selection = result.report.selection
    assert result.report.asked["allocator"] == "auto"
    assert selection.candidates[0].verdict == "chosen"
    assert [c.verdict for c in selection.candidates].count("chosen") == 1
    assert {c.name for c in selection.candidates} == set(sc.Auto().rules)
    assert all(c.macs <= 0.6 for c in selection.candidates if c.errors)
    assert selection.held == 80
    assert [r.repair for r in selection.rounds] == ["reconstruct"] * len(selection.rounds)
    assert [r.samples for r in selection.rounds] in ([64], [64, 80])
    last = [c for c in selection.candidates if len(c.errors) == len(selection.rounds)]
    assert selection.candidates[0].errors[-1] == min(c.errors[-1] for c in last)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    again = prune(net, data(batches=25), budget=sc.Budget(macs=0.6))
    assert again.plan == result.plan
    assert again.report.selection == selection
    for face in (str(result.report), result.report.to_markdown()):
        assert all(c.name in face.replace("\\", "") for c in selection.candidates)


def test_errors_of_the_last_round_are_those_of_the_model_made_by_hand(net: nn.Module) -> None:
    rules = {"a": sc.Uniform(removal="magnitude"), "b": sc.Uniform(removal="apoz")}
    given = data(labels=False, batches=5)
    result = prune(net, given, budget=sc.Budget(macs=0.5), allocator=sc.Auto(rules), repair="reconstruct")
    selection = result.report.selection
    whole = Calibration.of(given)
    fit, held = whole.split()
    graph = sc.trace(net, given[0][0])
    errors = {}
    for name, rule in rules.items():
        scores = sc.score(graph, fit, rule.signals, progress=False)
        plan = rule.allocate(graph, scores, sc.Budget(macs=0.5))
        small = sc.apply(net, plan, graph=graph)

        sweep("reconstruct", small, graph, fit)  # 64 samples are all that there are
        errors[name] = float(Judge(net, held)(small).mean())
    assert [r.samples for r in selection.rounds] == [64]
    assert selection.candidates[0].name == min(errors, key=lambda name: errors[name])
    for c in selection.candidates:
        assert c.errors[-1] == pytest.approx(errors[c.name], rel=1e-3)


def test_without_labels_what_needs_them_does_not_run(net: nn.Module) -> None:
    selection = prune(net, data(labels=False), budget=sc.Budget(macs=0.6)).report.selection
    verdicts = {c.name: c.verdict for c in selection.candidates}
    assert verdicts["tod"].startswith("did not run: ")
    assert "labels" in verdicts["tod"]
    assert not verdicts["repair_aware"].startswith("did not run")


def test_without_a_budget_tod_says_how_much(net: nn.Module) -> None:
    result = prune(net, data(), repair=None)
    tolerance = prune(net, data(), allocator="tod", repair=None)
    assert result.plan.predicted.macs <= tolerance.plan.predicted.macs
    with pytest.raises(BudgetError, match="Pass a budget"):
        prune(net, data(labels=False), repair=None)


def test_equal_plans_run_once_and_unrepaired_models_are_judged_as_they_are(net: nn.Module) -> None:
    auto = sc.Auto({"one": "uniform", "two": sc.Uniform(), "other": "global"})
    selection = prune(net, data(), budget=sc.Budget(macs=0.6), allocator=auto, repair=None).report.selection
    by_name = {c.name: c for c in selection.candidates}
    assert by_name["two"].verdict == "the same plan as one"
    assert by_name["two"].errors == ()
    assert [r.repair for r in selection.rounds] == [""]


def test_a_loss_judges_where_one_is_given(net: nn.Module) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    auto = sc.Auto({"one": "uniform", "other": "global"})
    result = prune(net, data(), budget=sc.Budget(macs=0.6), allocator=auto, loss_fn=loss)
    assert result.report.selection.measure == "loss"


def test_streams_are_the_groups_that_are_sums(net: nn.Module) -> None:
    graph = sc.trace(net, data()[0][0])
    assert streams(graph) == ("stem",)
    result = prune(
        net,
        data(),
        budget=sc.Budget(macs=0.7),
        allocator=sc.Auto({"x": sc.Auto().rules["repair_aware, streams whole"]}),
    )
    assert {g.name: g.kept == g.size for g in result.plan.groups}["stem"]


def test_what_cannot_be() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    with pytest.raises(UnreachableBudgetError):
        prune(model, data(), budget=sc.Budget(macs=1e-6))
    with pytest.raises(NothingToPruneError, match="labels"):
        prune(model, data(labels=False), budget=sc.Budget(macs=0.5), allocator=sc.Auto({"tod": "tod"}))
    with pytest.raises(SettingError, match="at least one candidate"):
        sc.Auto({})
    with pytest.raises(SettingError, match="finalists"):
        sc.Auto(finalists=0)
    with pytest.raises(SettingError, match="'auto'"):
        prune(model, data(), allocator="no such rule")


def test_compare_takes_it_as_one_of_its_rules(net: nn.Module) -> None:
    found = sc.compare(
        net, data(), {"auto": sc.Auto({"a": "uniform", "b": "global"}), "uniform": "uniform"},
        [sc.Budget(macs=0.6)], progress=False,
    )  # fmt: skip
    assert {o.rule for o in found.outcomes} == {"auto", "uniform"}
    assert np.isfinite([o.repaired.loss for o in found.outcomes]).all()
