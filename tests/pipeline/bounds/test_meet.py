"""Budgets that need models: all bounds hold at once, for every granularity, or it is said why not."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import BudgetError, SettingError
from secateur.measure.memory import memory
from tests.measure.latency.clock import Clock, clock
from tests.report.test_every import mixture

__all__ = ["clock"]

QUICK: dict[str, Any] = {"repair": "reconstruct", "measure_latency": False, "progress": False}


@cache
def trained() -> tuple[nn.Module, tuple[tuple[Tensor, Tensor], ...]]:
    """A network with far more units than its task needs, and 1,200 samples that it was not trained on."""
    torch.manual_seed(0)
    x, weights = torch.randn(1800, 6), torch.randn(6, 3)
    y = (x @ weights).argmax(1)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(net(x[:600]), y[:600]).backward()
        optimizer.step()
    parts = zip(x[600:].split(60), y[600:].split(60), strict=True)
    return net.eval(), tuple(parts)


def pruned(budget: sc.Budget, allocator: Any = "repair_aware", **more: Any) -> sc.Result:
    net, data = trained()
    return sc.prune(net, list(data), budget, allocator, **{**QUICK, **more})


@cache
def dropped() -> sc.Result:
    return pruned(sc.Budget(accuracy_drop=0.03))


def test_a_drop_is_confirmed_on_data_that_nothing_else_read() -> None:
    result = dropped()
    met: Any = result.plan.settings["met"]
    assert met["accuracy_drop"]["value"] <= met["accuracy_drop"]["at_most"] <= 0.03
    assert met["held_out_samples"] == 600
    assert result.scores.samples == 480
    assert result.plan.predicted.macs < 0.7 * result.plan.dense.macs
    assert result.plan.budget == {"accuracy_drop": 0.03}
    assert sc.record_of(result.model).plan == result.plan
    frontier = result.frontier
    assert frontier is not None
    (chosen,) = (point for point in frontier.points if point.verdict == "chosen")
    assert chosen.macs == result.plan.predicted.macs / result.plan.dense.macs
    assert chosen.value == result.report.figures[-1].accuracy
    assert frontier.dense == result.report.figures[0].accuracy


def test_the_same_seed_gives_the_same_model() -> None:
    one, other = dropped(), pruned(sc.Budget(accuracy_drop=0.03))
    assert one.plan.to_json() == other.plan.to_json()
    assert all(
        torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("bound", ["loss_rise", "perplexity_rise"])
def test_a_rise_is_confirmed(bound: str) -> None:
    result = pruned(sc.Budget(**{bound: 0.2}))  # type: ignore[arg-type]
    met: Any = result.plan.settings["met"]
    assert met[bound]["at_most"] <= 0.2
    loss = [figures.loss for figures in result.report.figures]
    rise = loss[-1] / loss[0] - 1 if bound == "loss_rise" else torch.tensor(loss[-1] - loss[0]).expm1().item()
    assert met[bound]["value"] == pytest.approx(rise, rel=1e-4)


def test_several_bounds_all_hold() -> None:
    net, data = trained()
    budget = sc.Budget(accuracy_drop=0.03, loss_rise=3.0, macs=0.8, memory=0.9, batch=2)
    result = pruned(budget)
    met: Any = result.plan.settings["met"]
    assert met["accuracy_drop"]["at_most"] <= 0.03
    assert met["loss_rise"]["at_most"] <= 3
    assert result.plan.predicted.macs <= 0.8 * result.plan.dense.macs
    x = (data[0][0][:2],)
    assert memory(result.model, x).total <= 0.9 * memory(net, x).total
    with pytest.raises(sc.UnreachableBudgetError, match=r"dense memory.*with accuracy_drop within bounds"):
        pruned(sc.Budget(accuracy_drop=0.03, memory=0.05, batch=2))


@pytest.mark.parametrize("bound", [0.5, "9 kB", 9_000])
def test_memory_is_met_as_nearly_as_units_allow(bound: Any) -> None:
    net, data = trained()
    result = pruned(sc.Budget(memory=bound, batch=1))
    x = (data[0][0][:1],)
    limit = 0.5 * memory(net, x).total if bound == 0.5 else 9_000
    unit = 4 * (6 + 1 + 40 + 40)
    assert limit - 2 * unit <= memory(result.model, x).total <= limit


def test_a_time_in_milliseconds(clock: Clock) -> None:
    net, _ = trained()
    whole = sum(p.numel() for p in net.parameters())

    def takes(model: nn.Module, *_: Any) -> None:
        clock.now += 0.01 + 0.04 * sum(p.numel() for p in model.parameters()) / whole

    handle = net.register_forward_hook(takes)
    try:
        result = pruned(sc.Budget(latency="30 ms"), form="module")
        with pytest.raises(sc.UnreachableBudgetError, match=r"at most 5\.00 ms, got 1\d\.\d ms on this"):
            pruned(sc.Budget(latency="5 ms"), form="module")
    finally:
        handle.remove()
    kept = result.plan.predicted.params / result.plan.dense.params
    assert 0.47 <= kept <= 0.5
    met: Any = result.plan.settings["met"]
    assert met["latency"]["high"] <= 0.03


def test_rules_compete_at_what_the_first_of_them_meets() -> None:
    rules = {"aware": "repair_aware", "even": "uniform"}
    result = pruned(sc.Budget(accuracy_drop=0.03), sc.Auto(rules))
    choice = result.report.selection
    assert choice is not None
    shares = {candidate.macs for candidate in choice.candidates if candidate.macs is not None}
    assert max(shares) < 0.7
    met: Any = result.plan.settings["met"]
    assert met["accuracy_drop"]["at_most"] <= 0.03
    smaller = pruned(sc.Budget(memory=0.6, batch=1), sc.Auto(rules))
    assert smaller.plan.budget == {"memory": 0.6, "batch": 1}


def test_single_weights() -> None:
    result = pruned(sc.Budget(accuracy_drop=0.03), "emp", granularity="weight")
    met: Any = result.plan.settings["met"]
    assert met["accuracy_drop"]["at_most"] <= 0.03
    assert result.plan.sparsity == pytest.approx(met["sparsity"], abs=0.01)
    for bound in ({"latency": 0.5}, {"memory": 0.5}):
        with pytest.raises(SettingError, match="zeros are"):
            pruned(sc.Budget(**bound), "emp", granularity="weight")  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["expert", "unit+expert"])
def test_experts(granularity: Any) -> None:
    model, data = mixture()
    result = sc.prune(
        model, data * 6, sc.Budget(loss_rise=2.0), "uniform", granularity, repair=None, progress=False,
        measure_latency=False,
    )  # fmt: skip
    met: Any = result.plan.settings["met"]
    assert met["loss_rise"]["at_most"] <= 2
    assert result.plan.predicted.params < result.plan.dense.params


def test_a_metric_of_the_users_own_decides() -> None:
    def sure(model: Any, batch: Any) -> Tensor:
        return model(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]

    result = pruned(sc.Budget(accuracy_drop=0.05), metric=sure)
    assert result.frontier is not None
    assert result.frontier.measure == "sure"
    met: Any = result.plan.settings["met"]
    assert met["accuracy_drop"]["at_most"] <= 0.05


@pytest.mark.parametrize("metric", ["error", "constant"])
def test_a_metric_that_does_not_fall_is_refused(metric: str) -> None:
    def error(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def constant(model: Any, batch: Any) -> Tensor:
        return torch.ones_like(batch[1])

    given = {"error": error, "constant": constant}[metric]
    with pytest.raises(BudgetError, match=rf"falls when a model gets worse, got {metric}: .* minus an error"):
        pruned(sc.Budget(accuracy_drop=0.05), metric=given)


def test_without_labels_it_is_agreement_and_held_out_data_can_be_given() -> None:
    net, data = trained()
    bare = [x for x, _ in data]
    result = sc.prune(
        net, bare[:5], sc.Budget(accuracy_drop=0.04), "repair_aware", held_out=bare[5:], **QUICK
    )
    assert result.frontier is not None
    assert result.frontier.measure == "agreement with the dense model"
    assert result.frontier.samples == 900
    assert result.frontier.dense == 1


def test_a_frontier_and_the_models_on_it() -> None:
    result = pruned(sc.Budget(macs=0.5), frontier=(0.4, 0.8))
    frontier = result.frontier
    assert frontier is not None
    assert [point.share for point in frontier.points] == [0.8, 0.4]
    assert frontier.limit is None
    assert all(point.low <= point.damage <= point.high for point in frontier.points)
    other = result.at(frontier.points[0])
    assert other.plan.predicted.macs / other.plan.dense.macs == frontier.points[0].macs
    assert other.report.figures[-1].accuracy == frontier.points[0].value
    assert other.report.asked["budget"] == {"macs": 0.8}
    alone = pruned(sc.Budget(macs=0.8), frontier=(0.8,))
    assert alone.plan.keep.keys() == other.plan.keep.keys()
    assert all((alone.plan.keep[name] == mask).all() for name, mask in other.plan.keep.items())
    with pytest.raises(SettingError, match=r"Result\.at: expected a result that secateur\.prune"):
        sc.Result(result.model, result.plan, result.scores, result.graph, result.report).at(0.5)


@pytest.mark.parametrize(
    ("budget", "more", "message"),
    [
        (sc.Budget(accuracy_drop=0.001), {}, r"at least 2,995 held-out samples .* got 600"),
        (sc.Budget(accuracy_drop=0.03), {"steps": 2}, r"steps=2.*got accuracy_drop"),
        (sc.Budget(macs=0.5), {"held_out": [1]}, r"prune\(held_out=\.\.\.\): expected it together with"),
        (sc.Budget(macs=0.5), {"frontier": 0.5}, r"prune\(frontier=0\.5\): expected shares"),
        (sc.Budget(accuracy_drop=0.05), {"metric": "auc"}, r"prune\(metric='auc'\): expected a function"),
        (sc.Budget(macs=0.5), {"metric": len}, r"prune\(metric=\.\.\.\): expected it together with"),
        (sc.Budget(macs=0.5), {"frontier": (1.5,)}, r"prune\(frontier=\(1\.5,\)\): expected shares"),
        (
            sc.Budget(memory=0.5, device="nowhere"),
            {},
            r"device='nowhere'\): expected a device of this machine",
        ),
        (sc.Budget(accuracy_drop=0.03, params=10), {}, r"expected at most 10 params .*as the smallest"),
        (sc.Budget(memory=0.9, params=10), {}, r"expected at most 10 params .*as the smallest"),
        (sc.Budget(loss_rise=0.1), {"loss_fn": lambda m, b: -(m(b[0]) ** 2).mean()}, "mean loss is above 0"),
        (sc.Budget(memory=0.5, tokens=9), {}, r"expected a model that gives a key-value cache"),
    ],
)
def test_what_means_nothing_is_refused(budget: sc.Budget, more: dict[str, Any], message: str) -> None:
    with pytest.raises((BudgetError, SettingError), match=message):
        pruned(budget, **more)


def test_a_frontier_of_shares_that_no_plan_reaches_has_no_points() -> None:
    result = pruned(sc.Budget(macs=0.5), "uniform", frontier=(0.001,), limits=sc.Limits(max_ratio=0.6))
    assert result.frontier is None


def test_held_out_data_of_another_shape_are_refused_before_anything_is_scored() -> None:
    _, batches = trained()
    other = [(x[:, :2], y) for x, y in batches]
    with pytest.raises(sc.CalibrationError, match="held-out data, batch 0: expected batches that the model"):
        pruned(sc.Budget(accuracy_drop=0.05), "repair_aware", held_out=other)


def test_compare_takes_ceilings_but_not_quality() -> None:
    net, data = trained()
    asked: dict[str, Any] = {"repair": None, "progress": False}
    found = sc.compare(net, list(data), ["uniform"], [sc.Budget(memory=0.7, batch=1)], **asked)
    assert found.outcomes[0].cost.params < 0.75 * found.cost.params
    with pytest.raises(BudgetError, match=r"got accuracy_drop, which is decided on held-out data\. Use"):
        sc.compare(net, list(data), ["uniform"], [sc.Budget(accuracy_drop=0.03)], **asked)
    with pytest.raises(SettingError, match=r"compare\(budget=Budget\(memory=\.\.\.\)\).*zeros are stored"):
        sc.compare(net, list(data), ["emp"], [sc.Budget(memory=0.5)], granularity="weight", **asked)
