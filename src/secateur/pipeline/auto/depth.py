"""Measure how much errors at each depth of a network change its outputs, once later layers are repaired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from secateur.allocators import Budget, RepairAware
from secateur.calibration import Calibration, seeded
from secateur.calibration.subset import take_share
from secateur.errors import UnreachableBudgetError
from secateur.pipeline.auto.choose import FEW, LEAST, fixed, measured
from secateur.plan import Plan
from secateur.repairs.judging import Judge
from secateur.signals.scores import Scores

if TYPE_CHECKING:
    from secateur.pipeline.targets.target import Target

PARTS = 4
"""Number of parts by default."""

FARTHEST = 32.0
"""No factor is more than this many times larger or smaller than the typical one."""

TINY = 1e-6
"""A share of the cost that no plan reaches."""


def weighted_by_depth(rule: RepairAware, target: Target, data: Calibration, scores: Scores) -> RepairAware:
    r"""Give a rule factors that say how much an error at each depth changes the outputs.

    `RepairAware` adds up the errors of groups. But after an early error come many layers that are refitted
    and undo a part of it; a late error reaches the outputs as it is. So the groups are divided into parts, in
    order of execution. For each part, a model is pruned in this part alone, as the rule's own plan for half
    of the cost says, and repaired. Its outputs are compared with the dense model's: a distance
    :math:`D_p`. With :math:`E_g` the error that the rule predicts of a group, the factor of the groups of
    part p is

    .. math:: f_p \propto D_p / \textstyle\sum_{g \in p} E_g .

    It holds in the middle of the part; lines through these points give the others. The mean of all
    logarithms is 0. Factors hardly depend on the budget, so they are measured once for all budgets.

    Source: ours.

    Args:
        rule: The rule; its `parts` say how many models are measured at most.
        target: What is removed, with the model and the held-out data that outputs are compared on.
        data: What repairs read.
        scores: Of the rule's signal.

    Returns:
        The rule with factors: those that it had times what was measured. If fewer than two parts can lose
        units, the rule as it would be without `parts`.
    """
    plain = replace(rule, parts=0, error=None)
    plan = _half_way(plain, target, scores)
    losing = [number for number, group in enumerate(plan.groups) if group.removed]
    parts = [part for part in np.array_split(losing, min(rule.parts, len(losing) or 1)) if len(part)]
    middles, heights = _measured_parts(plan, parts, target, data) if len(parts) > 1 else ([], [])
    if len(middles) < 2:
        return replace(rule, parts=0)
    logarithm = _through(np.arange(len(plan.groups), dtype=np.float64), middles, heights)
    logarithm = (logarithm - np.median(logarithm)).clip(-np.log(FARTHEST), np.log(FARTHEST))
    found = np.exp(logarithm - logarithm.mean()).tolist()
    factors = {
        group.name: rule.factors.get(group.name, 1.0) * factor
        for group, factor in zip(plan.groups, found, strict=True)
    }
    return replace(rule, parts=0, factors=factors)


def _through(x: NDArray[np.float64], at: Sequence[float], height: Sequence[float]) -> NDArray[np.float64]:
    """Lines through points (at, height), the first and the last one drawn on to both ends. [len(x)]

    Example:
        >>> _through(np.arange(5.0), [1.0, 2.0], [0.0, 1.0]).tolist()
        [-1.0, 0.0, 1.0, 2.0, 3.0]
    """
    inside = np.interp(x, at, height)
    first, last = ((height[k + 1] - height[k]) / (at[k + 1] - at[k]) for k in (0, len(at) - 2))
    return inside + first * (x - at[0]).clip(max=0) + last * (x - at[-1]).clip(min=0)


def _half_way(rule: RepairAware, target: Target, scores: Scores) -> Plan:
    """The rule's plan for a cost half way between the dense model and the smallest that it reaches."""

    def at(share: float) -> Plan:
        budget = Budget(params=share) if rule.per == "params" else Budget(macs=share)
        plan: Plan = target.allocate(rule, scores, budget)
        return plan

    smallest = TINY
    try:
        at(TINY)
    except UnreachableBudgetError as error:
        smallest = error.smallest
    return at((1 + smallest) / 2)


def _measured_parts(
    plan: Plan, parts: Sequence[NDArray[np.int64]], target: Target, data: Calibration
) -> tuple[list[float], list[float]]:
    """Measure a plan part by part.

    Args:
        plan: The plan.
        parts: Numbers of the groups of each part.
        target: What is removed.
        data: What repairs read a part of, as those of `auto` do in its first round.

    Returns:
        The middles of the parts, as numbers of groups, and the logarithms of measured distance over predicted
        error. A part whose model can't be made, or does not differ from the dense one, is left out.
    """
    judge = Judge(target.task.model, target.task.held)
    few = take_share(data, max(FEW, LEAST / data.samples()), whole=fixed(target))
    errors: Any = plan.certificates["error"]
    middles: list[float] = []
    heights: list[float] = []
    with seeded(target.task.seed):
        for part in parts:
            names = {plan.groups[number].name for number in part}
            found = measured(target, judge, _alone(plan, names, target), few)
            distance = 0.0 if isinstance(found, str) else float(np.mean(found))
            ratio = distance / (sum(errors[name] for name in names) or math.inf)
            if 0 < ratio < math.inf:
                middles.append(float(part.mean()))
                heights.append(math.log(ratio))
    return middles, heights


def _alone(plan: Plan, names: set[str], target: Target) -> Any:
    """The plan, with all groups whole but these."""
    keep = {name: mask for name, mask in plan.keep.items() if name in names}
    return Plan.build(target.graph, keep, allocator=plan.allocator, seed=plan.seed)
