"""``Budget(latency=0.6)``: a rule's plan whose model was measured to be that fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from pydantic import JsonValue
from torch import nn

from secateur.allocate import Budget
from secateur.apply.apply import apply
from secateur.graph.graph import Graph
from secateur.graph.inputs import call_arguments
from secateur.latency.interval import Interval, median_ratio
from secateur.latency.search import fast_enough
from secateur.latency.timing import latency
from secateur.models import device_of
from secateur.plan import Plan

ROUNDS = 30


def meet_latency_budget(
    model: nn.Module,
    graph: Graph,
    budget: Budget,
    allocate: Callable[[Budget], Plan],
    example_inputs: Any,
    form: Literal["auto", "module", "graph", "masked"] = "auto",
) -> Plan:
    """The plan with the most MACs, of a handful tried, that the whole budget allows.

    Each plan tried is applied and timed against the dense model on the example inputs, in eager mode. What
    comes out depends on this machine, and on how busy it is.

    Args:
        model: The dense model.
        graph: Its trace.
        budget: With a bound on latency; its other bounds hold too.
        allocate: The rule: a plan for a budget without latency.
        example_inputs: What is timed; its batch size matters.
        form: Of the model that is timed.

    Returns:
        The plan. ``settings["latency"]`` has the measured share with its interval, and how it was found.

    Raises:
        UnreachableBudgetError: No plan that was tried is fast enough.
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

    def measure(plan: Plan) -> Interval:
        small = apply(model, plan, form, graph=graph, example_inputs=example_inputs)
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
