"""From scores of single weights to masks, by the same rules as for units."""

from __future__ import annotations

from typing import Any

from secateur.allocate import Allocator, Budget, Limits, resolve
from secateur.allocate.registry import RULES, Allocates
from secateur.allocate.signals import table
from secateur.errors import SettingError
from secateur.masks.plan import MaskPlan
from secateur.masks.weights import Weights
from secateur.score.scores import Scores

LIMITS = Limits(max_ratio=1 - 1e-12)
"""The default: one weight of each tensor stays. The bound on units, 99 %, is below common sparsities."""


def allocate(
    weights: Weights,
    scores: Scores,
    allocator: str | Allocates,
    budget: Budget | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> MaskPlan:
    """Decides which weights go.

    Args:
        weights: Of the model.
        scores: From `secateur.masks.score`; at least the criterion that the rule names as its removal signal.
        allocator: A name or an instance of an `Allocator`: the rules are those for units, each tensor
            a group.
        budget: ``Budget(sparsity=0.9)``; None leaves the decision to the rule's own setting.
        limits: What the rule may not overstep; by default one weight of each tensor stays.
        seed: Recorded in the plan.

    Raises:
        SettingError: The rule decides on units only, or has no value for its knob.
        ScoreError: The scores do not fit.
        BudgetError: It bounds something else than sparsity, or no value of the knob meets it.
    """
    rule = resolve(allocator)
    if not isinstance(rule, Allocator) or not rule.on_weights:
        known = ", ".join(name for name, other in RULES.items() if other.on_weights)
        raise SettingError(f"masks: expected a rule for single weights, got {rule!r}. Use one of {known}.")
    graph: Any = weights  # a rule asks a graph for its groups and their cost, which is what these have
    limits = LIMITS if limits is None else limits
    values = table(scores, graph, rule.signals)
    decision = rule.decide(graph, values, budget, limits)
    shapes = {group.name: group.shape for group in weights.groups}
    return MaskPlan(
        weights.fingerprint,
        rule.name,
        {name: keep.reshape(shapes[name]) for name, keep in decision.keep.items()},
        rule.settings(decision.knob) | {"limits": limits.as_settings()},
        seed,
        None if budget is None else budget.as_settings(),
        rule.certificates(graph, values, limits, decision),
        weights.parameters,
        weights.alone,
    )
