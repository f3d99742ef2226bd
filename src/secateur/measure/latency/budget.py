"""``Budget(latency=0.6)``: find a plan whose pruned model is measured to be that fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from pydantic import JsonValue
from torch import nn

from secateur.allocators import Budget
from secateur.common.models import device_of
from secateur.graph.graph import Graph
from secateur.graph.inputs import call_arguments
from secateur.measure.latency.interval import Interval, median_ratio
from secateur.measure.latency.search import fast_enough
from secateur.measure.latency.timing import latency
from secateur.plan import Plan
from secateur.targets.units.apply import Applier

ROUNDS = 30


def meet_latency_budget(
    model: nn.Module,
    graph: Graph,
    budget: Budget,
    allocate: Callable[[Budget], Plan],
    example_inputs: Any,
    form: Literal["auto", "module", "graph", "masked"] = "auto",
) -> Plan:
    """Try a few plans, and return the one with the most MACs that meets the budget.

    Each plan is applied, and the pruned model is timed against the dense model on the example inputs, in
    eager mode. The result depends on this machine and on its load.

    Args:
        model: The dense model.
        graph: The trace of the dense model.
        budget: The budget. If it has no bound on latency, the rule decides alone. Other bounds hold too.
        allocate: The rule: returns a plan for a budget without latency.
        example_inputs: The inputs of the timed forward passes. Their batch size matters.
        form: The form of the model that is timed.

    Returns:
        The plan. ``settings["latency"]`` holds the measured latency as a share of the dense one, with its
        interval, the share of MACs, and the number of plans that were timed.

    Raises:
        UnreachableBudgetError: If no plan that was tried is fast enough.
    """
    if budget.latency is None:
        return allocate(budget)
    args, kwargs = call_arguments(example_inputs, device_of(model))
    dense = graph.cost()
    most = 1.0
    if budget.macs is not None:
        most = replace(budget, latency=None).targets(dense)["macs"] / dense.macs

    def plan_at(macs: float) -> Plan:
        return allocate(replace(budget, latency=None, macs=macs))

    applied = Applier(model, graph)

    def measure(plan: Plan) -> Interval:
        small = applied(plan, form, example_inputs=example_inputs)
        whole, part = latency([model, small], args, kwargs, runs=ROUNDS)
        return median_ratio(part.seconds, whole.seconds)

    found = fast_enough(budget.latency, plan_at, measure, most=most)
    measured: dict[str, JsonValue] = {
        "share": found.share.value,
        "low": found.share.low,
        "high": found.share.high,
        "macs": found.macs,
        "plans_measured": found.probes,
    }
    return found.what.model_copy(
        update={"budget": budget.as_settings(), "settings": {**found.what.settings, "latency": measured}}
    )
