"""Ranks in `sc.repair`: both layers of each pair are refitted, by the repairs of units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.calibration import Calibration, Forward
from secateur.common.models import device_of, unwrap
from secateur.graph.graph import Graph
from secateur.graph.trace import trace_units
from secateur.plan import Plan
from secateur.repairs.methods import Method, Methods, resolve
from secateur.repairs.repair import run_repairs
from secateur.signals.loss import LossFn
from secateur.targets.lowrank.graph import RankGraph, dense_fingerprint
from secateur.targets.lowrank.opened import opened, require_pairs
from secateur.targets.units.copying import duplicate
from secateur.targets.units.record import attach, record_of


def repair(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: Methods = "auto",
    *,
    own: Mapping[str, Method] | None = None,
    graph: RankGraph | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Reduce the error that low ranks cause: see `secateur.repair`.

    In order of execution, ``reconstruct`` refits the first layer of a pair to the dense model's values along
    the directions that stay, and the second one to the dense outputs, from what the pruned model gives.

    Args:
        small: As for `secateur.repair`.
        model: What `secateur.factorise` returned, for which the plan was made.
        calibration: As for `secateur.repair`.
        methods: As for `secateur.repair`.
        own: As for `secateur.repair`.
        graph: Not read: a pair whose directions all stay is one layer here.
        loss_fn: As for `secateur.repair`.
        forward: As for `secateur.repair`.
        seed: As for `secateur.repair`.
        progress: As for `secateur.repair`.

    Raises:
        PlanError: The model is not the one that the plan was made for, or not factorised.
    """
    record = record_of(small)
    plan: Plan = record.plan
    model = unwrap(model)
    if not resolve(methods, own):
        return duplicate(small)
    plan.check(dense_fingerprint(model))
    require_pairs("repair", model)
    found = opened(model, plan)
    data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
    first = data.to(device_of(model)).first()
    exact = all(group.exact for group in plan.groups)
    traced: list[Graph] = [trace_units(found.model, first.inputs, allow_inexact=not exact)]
    known = attach(duplicate(small), replace(record, plan=found.plan))
    better = run_repairs(
        known,
        found.model,
        data,
        methods,
        traced,
        own=own,
        loss_fn=loss_fn,
        seed=seed,
        progress=progress,
    )
    return attach(better, replace(record_of(better), plan=plan))
