"""Rules for single weights that compete."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from secateur.errors import NothingToPruneError, SettingError, UnreachableBudgetError
from secateur.pipeline.targets.weights import CANDIDATES as DEFAULT
from secateur.repairs.judging import Judge
from secateur.repairs.methods import REPAIRS, Work
from secateur.targets.weights.apply import apply
from tests.targets.weights.nets import allocate, data, net, prune, traced

CANDIDATES = {"even": sc.Uniform(), "emp": sc.EMP(), "wanda": sc.ERK(removal="wanda")}


def test_the_winner_is_who_measures_best_in_the_last_round_and_its_plan_is_the_rules_own() -> None:
    model, batches = net(), data(5, 8)
    before = copy.deepcopy(model.state_dict())
    result = prune(model, batches, sc.Budget(sparsity=0.6), sc.Auto(CANDIDATES), "variance", progress=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    contest = result.report.selection
    assert contest is not None
    first = contest.candidates[0]
    assert {c.name for c in contest.candidates} == set(CANDIDATES)
    alone = prune(model, batches, sc.Budget(sparsity=0.6), CANDIDATES[first.name], "variance", progress=False)
    assert all(np.array_equal(m, alone.plan.masks[name]) for name, m in result.plan.masks.items())
    assert all(torch.equal(t, alone.model.state_dict()[n]) for n, t in result.model.state_dict().items())
    assert (result.report.rule, result.report.asked["allocator"]) == (alone.plan.allocator, "auto")

    assert [layer.scores for layer in result.report.layers] == [layer.scores for layer in alone.report.layers]

    # By hand: with this little data there is one round, on all that is not held out.
    fit, held = sc.Calibration.of(batches).split()
    judge, graph, errors = Judge(model, held), result.graph, {}
    for name, rule in CANDIDATES.items():
        plan = allocate(traced(model), result.scores, rule, sc.Budget(sparsity=0.6))
        small = apply(model, plan, graph)
        REPAIRS["variance"].run(small, Work(lambda: graph, fit))
        errors[name] = float(judge(small).mean())
    assert {c.name: c.errors[0] for c in contest.candidates} == pytest.approx(errors)
    assert first.name == min(errors, key=lambda name: errors[name])
    assert first.params == pytest.approx(result.report.figures[1].params / result.report.figures[0].params)


def test_by_name_all_candidates_run_and_without_a_budget_emp_says_how_much() -> None:
    batches: Any = [(x,) for x, *_ in data(5, 8)]
    result = sc.prune(net(), batches, None, "auto", "weight", repair=None, progress=False)
    contest = result.report.selection
    assert contest is not None
    assert {c.name for c in contest.candidates} == set(DEFAULT)
    assert not any("did not run" in c.verdict for c in contest.candidates)
    alone = prune(net(), batches, None, "emp", None, progress=False)
    assert result.plan.sparsity == pytest.approx(alone.plan.sparsity, abs=2e-3)
    assert contest.rounds[0].repair == ""


def test_what_cannot_be() -> None:
    with pytest.raises(UnreachableBudgetError):
        prune(net(), data(5, 8), sc.Budget(sparsity=1 - 1e-9), "auto", progress=False)
    with pytest.raises(NothingToPruneError, match="single weights"):
        prune(net(), data(5, 8), sc.Budget(sparsity=0.5), sc.Auto({"a": Uncut()}), progress=False)
    rules = sc.Auto({"a": sc.Uniform(removal="l1")})
    with pytest.raises(SettingError, match="removal signal"):
        prune(net(), data(5, 8), sc.Budget(sparsity=0.5), rules, progress=False)


class Uncut:
    """A rule for units only."""

    signals = ("magnitude",)

    def allocate(self, *_: Any) -> Any:
        raise AssertionError
