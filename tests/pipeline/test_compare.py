from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import SettingError
from secateur.measure.evaluate import Evaluation
from secateur.pipeline.compare import Comparison, Missed, Outcome, draw
from secateur.plan import CostRecord
from tests.targets.experts.models import PlainLM, words


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def data(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(20, 6, generator=generator) for _ in range(10)]
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in inputs]


def test_each_outcome_is_what_prune_makes() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    budgets = [sc.Budget(macs=0.75), sc.Budget(params=0.4)]
    rules = {"tod": sc.ToD(), "plain": sc.Uniform(removal="l2"), "rr": "repairability"}
    found = sc.compare(model, data(model), rules, budgets, seed=4, progress=False)
    assert [(o.rule, o.budget) for o in found.outcomes] == [
        (name, budget.as_settings()) for budget in budgets for name in rules
    ]
    assert found.missed == ()
    for outcome in found.outcomes:
        budget = budgets[0] if "macs" in outcome.budget else budgets[1]
        one = sc.prune(
            model, data(model), budget, rules[outcome.rule], seed=4, progress=False, measure_latency=False
        )
        figures = {each.stage: each for each in one.report.figures}
        assert outcome.cost == one.plan.predicted
        assert (outcome.pruned.loss, outcome.pruned.accuracy) == (
            figures["pruned"].loss,
            figures["pruned"].accuracy,
        )
        last = figures.get("repaired", figures["pruned"])
        assert (outcome.repaired.loss, outcome.repaired.accuracy) == (last.loss, last.accuracy)
        assert found.dense.accuracy == figures["dense"].accuracy == 1.0
    assert any(outcome.repair for outcome in found.outcomes)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert json.loads(json.dumps(found.to_dict()))["dense"]["macs"] == found.cost.macs


def test_a_rule_that_misses_a_budget_stops_nothing() -> None:
    model = net()
    limits = sc.Limits(min_keep=8)
    found = sc.compare(
        model, data(model), ["uniform", "random"], [sc.Budget(macs=0.9), sc.Budget(macs=0.1)], None,
        limits=limits, progress=False,
    )  # fmt: skip
    assert [o.rule for o in found.outcomes] == ["uniform", "random"]
    assert [m.rule for m in found.missed] == ["uniform", "random"]
    assert all(0.1 < m.smallest < 0.9 and m.budget == {"macs": 0.1} for m in found.missed)
    assert all(o.repaired == o.pruned and o.repair == "" for o in found.outcomes)
    assert f"not reached; the least is {found.missed[0].smallest:g}" in str(found)


def test_bad_input() -> None:
    model = net()
    with pytest.raises(SettingError, match="expected rules and budgets, got 0 and 3"):
        sc.compare(model, data(model), [])
    with pytest.raises(SettingError, match="got 6 and 0"):
        sc.compare(model, data(model), budgets=[])
    with pytest.raises(SettingError, match="expected a list of budgets, got a single one"):
        sc.compare(model, data(model), ["uniform"], sc.Budget(macs=0.5))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="expected names of rules, or a mapping"):
        sc.compare(model, data(model), [sc.RepairAware(), "tod"])  # type: ignore[list-item]
    for wrong in ("tod", sc.Budget(macs=0.5)):
        with pytest.raises(SettingError, match=r"expected names of rules, .*; budgets= takes the budgets"):
            sc.compare(model, data(model), wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="'best'"):
        sc.compare(model, data(model), ["best"])
    with pytest.raises(SettingError, match="glue"):
        sc.compare(model, data(model), repair="glue")


def evaluation(accuracy: float | None, loss: float = 1.0) -> Evaluation:
    return Evaluation(loss, accuracy, 50)


def made(accuracy: bool = True) -> Comparison:
    def outcome(rule: str, share: float, pruned: float, repaired: float) -> Outcome:
        cost = CostRecord(params=int(100 * share), macs=int(1000 * share))
        values = [evaluation(v if accuracy else None, 2 - v) for v in (pruned, repaired)]
        return Outcome(rule, {"macs": share}, cost, *values, "bias")

    outcomes = (
        outcome("a", 0.8, 0.5, 0.75),
        outcome("b", 0.8, 0.625, 0.625),
        outcome("a", 0.5, 0.25, 0.5),
    )
    missed = (Missed("b", {"macs": 0.5}, 0.625),)
    return Comparison(
        "Net", evaluation(0.875 if accuracy else None), CostRecord(params=100, macs=1000), outcomes, missed
    )


def test_the_table() -> None:
    rows = [line.split() for line in str(made()).splitlines()]
    assert str(made()).startswith("Net: 100 parameters, 1,000 MACs for one sample; dense: top-1 87.5 % on 50")
    assert rows[3] == ["macs", "0.8", "a", "80.0", "%", "80.0", "%", "50.0", "%", "75.0", "%", "*", "bias"]
    assert rows[4] == ["macs", "0.8", "b", "80.0", "%", "80.0", "%", "62.5", "%", "62.5", "%", "bias"]
    assert rows[5] == ["macs", "0.5", "a", "50.0", "%", "50.0", "%", "25.0", "%", "50.0", "%", "*", "bias"]
    assert rows[6] == ["macs", "0.5", "b", "not", "reached;", "the", "least", "is", "0.625"]
    by_loss = made(accuracy=False)
    assert not by_loss.by_accuracy
    best = by_loss.best({"macs": 0.8})
    assert best is not None
    assert best.rule == "a"
    assert "1.25 *" in str(by_loss)
    assert made().best({"macs": 0.3}) is None


@pytest.mark.parametrize("accuracy", [True, False])
def test_the_plot(tmp_path: Path, accuracy: bool) -> None:
    pytest.importorskip("matplotlib")
    draw(made(accuracy), tmp_path / "one.svg")
    draw(made(accuracy), tmp_path / "two.svg")
    first = (tmp_path / "one.svg").read_bytes()
    assert first == (tmp_path / "two.svg").read_bytes()
    assert b"% of dense MACs" in first
    assert (b"top-1 %" in first) is accuracy
    with pytest.raises(SettingError, match="expected a file that ends in"):
        draw(made(), tmp_path / "one.txt")


def test_single_weights_and_experts_are_compared_too() -> None:
    model, budget = net(), sc.Budget(sparsity=0.5)
    found = sc.compare(
        model, data(model), ["emp", "uniform"], [budget], granularity="weight", seed=4, progress=False
    )
    for outcome in found.outcomes:
        one = sc.prune(model, data(model), budget, outcome.rule, "weight", seed=4, progress=False)
        assert outcome.cost.params == found.cost.params - one.plan.removed
        assert outcome.cost.macs == found.cost.macs
        assert outcome.repaired.loss == one.report.figures[-1].loss
    mixture = PlainLM().eval()
    batches = [words(seed=s) for s in range(5)]
    rules = {"reap": sc.Uniform(removal="reap"), "random": "random"}
    found = sc.compare(mixture, batches, rules, granularity="expert", seed=4, progress=False)
    assert [(o.rule, o.budget["experts"]) for o in found.outcomes] == [
        (rule, share) for share in (0.75, 0.5) for rule in rules
    ]
    for outcome in found.outcomes:
        asked = sc.Budget(experts=outcome.budget["experts"])
        rule = rules[outcome.rule]
        one = sc.prune(mixture, batches, asked, rule, "expert", seed=4, progress=False)
        assert outcome.cost == one.plan.predicted
        assert outcome.repaired.loss == one.report.figures[-1].loss
    assert found.to_dict()["granularity"] == "expert"


def test_what_a_granularity_does_not_have_is_refused() -> None:
    with pytest.raises(SettingError, match="masks leave all shapes"):
        sc.compare(net(), [], granularity="weight", allow_inexact=True)
    with pytest.raises(SettingError, match="expected one of auto, module"):
        sc.compare(net(), [], granularity="expert", form="graph")
    with pytest.raises(SettingError, match="granularity"):
        sc.compare(net(), [], granularity="layer")  # type: ignore[arg-type]
