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
"""Factors are clipped to this many times the median factor, and to the median over this number."""

TINY = 1e-6
"""A share of the cost that no plan reaches."""


def weighted_by_depth(rule: RepairAware, target: Target, data: Calibration, scores: Scores) -> RepairAware:
    r"""Give a rule factors that say how much an error at each depth changes the outputs.

    `RepairAware` adds up the errors of groups. But many refitted layers follow an early error and undo a part
    of it, while a late error reaches the outputs unchanged. So the groups are divided into parts, in order of
    execution. For each part, a model is pruned in this part alone, according to the rule's plan for half of
    the cost, and repaired. Its outputs have the distance :math:`D_p` to those of the dense model. With
    :math:`E_g` the error that the rule predicts for group g, the factor of the groups of part p is

    .. math:: f_p \propto D_p / \textstyle\sum_{g \in p} E_g .

    This is the factor in the middle of the part. The logarithms of the others are interpolated linearly, and
    their mean is set to 0. Factors hardly depend on the budget, so they are measured once for all budgets.

    Source: ours.

    Args:
        rule: The rule. At most `parts` models are measured.
        target: The target, with the model and the held-out data that outputs are compared on.
        data: The data that repairs read.
        scores: Scores of the rule's signal.

    Returns:
        The rule, with its own factors times the measured ones. If fewer than two parts can lose units, the
        rule without `parts`.
    """
    plain = replace(rule, parts=0, error=None)
    plan = _plan_half_way(plain, target, scores)
    losing = [number for number, group in enumerate(plan.groups) if group.removed]
    parts = [part for part in np.array_split(losing, min(rule.parts, len(losing) or 1)) if len(part)]
    middles, logarithms = _measured_parts(plan, parts, target, data) if len(parts) > 1 else ([], [])
    if len(middles) < 2:
        return replace(rule, parts=0)
    logarithm = _interpolated(np.arange(len(plan.groups), dtype=np.float64), middles, logarithms)
    logarithm = (logarithm - np.median(logarithm)).clip(-np.log(FARTHEST), np.log(FARTHEST))
    found = np.exp(logarithm - logarithm.mean()).tolist()
    factors = {
        group.name: rule.factors.get(group.name, 1.0) * factor
        for group, factor in zip(plan.groups, found, strict=True)
    }
    return replace(rule, parts=0, factors=factors)


def _interpolated(x: NDArray[np.float64], at: Sequence[float], value: Sequence[float]) -> NDArray[np.float64]:
    """Interpolate linearly through points (at, value); the outer lines continue beyond the ends. [len(x)]

    Example:
        >>> _interpolated(np.arange(5.0), [1.0, 2.0], [0.0, 1.0]).tolist()
        [-1.0, 0.0, 1.0, 2.0, 3.0]
    """
    inside = np.interp(x, at, value)
    first, last = ((value[k + 1] - value[k]) / (at[k + 1] - at[k]) for k in (0, len(at) - 2))
    return inside + first * (x - at[0]).clip(max=0) + last * (x - at[-1]).clip(min=0)


def _plan_half_way(rule: RepairAware, target: Target, scores: Scores) -> Plan:
    """Make the rule's plan for the cost half way between the dense model and the smallest plan."""

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
        target: The target.
        data: Repairs read a small share of these data, as in the first round of `auto`.

    Returns:
        The middle of each part, as a number of a group; and the logarithm of measured distance over predicted
        error. A part whose model cannot be made, or does not differ from the dense one, is left out.
    """
    judge = Judge(target.task.model, target.task.held)
    few = take_share(data, max(FEW, LEAST / data.samples()), whole=fixed(target))
    errors: Any = plan.certificates["error"]
    middles: list[float] = []
    logarithms: list[float] = []
    with seeded(target.task.seed):
        for part in parts:
            names = {plan.groups[number].name for number in part}
            found = measured(target, judge, _only_groups(plan, names, target), few)
            distance = 0.0 if isinstance(found, str) else float(np.mean(found))
            ratio = distance / (sum(errors[name] for name in names) or math.inf)
            if 0 < ratio < math.inf:
                middles.append(float(part.mean()))
                logarithms.append(math.log(ratio))
    return middles, logarithms


def _only_groups(plan: Plan, names: set[str], target: Target) -> Any:
    """Return the plan for these groups only; all others stay whole."""
    keep = {name: mask for name, mask in plan.keep.items() if name in names}
    return Plan.build(target.graph, keep, allocator=plan.allocator, seed=plan.seed)
