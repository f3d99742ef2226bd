"""Turn scores of single weights into masks, with the same allocators as for units."""

from __future__ import annotations

from typing import Any

from secateur.allocators import Allocator, Budget, Limits, resolve
from secateur.allocators.registry import RULES, Allocates
from secateur.allocators.signals import table
from secateur.errors import SettingError
from secateur.signals.scores import Scores
from secateur.targets.weights.plan import MaskPlan
from secateur.targets.weights.weights import Weights

LIMITS = Limits(max_ratio=1 - 1e-12)
"""Default limits: at least one weight of each tensor stays.

The default for units removes at most 99 % of a group. Common sparsities of single weights are higher than
that.
"""


def allocate(
    weights: Weights,
    scores: Scores,
    allocator: str | Allocates,
    budget: Budget | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> MaskPlan:
    """Decide which weights are set to zero.

    Args:
        weights: The model's maskable weights.
        scores: Result of `secateur.signals.weights.score`. It must hold the signals that the allocator reads.
        allocator: Name or instance of an `Allocator`. It treats each weight tensor as one group.
        budget: For example ``Budget(sparsity=0.9)``. None: the allocator's own setting decides.
        limits: Limits on what may be removed. None: at least one weight of each tensor stays.
        seed: Stored in the plan.

    Returns:
        The masks, with the settings that led to them.

    Raises:
        SettingError: The allocator works on units only, or has no value for its knob.
        ScoreError: The scores do not fit the weights.
        BudgetError: The budget bounds something other than sparsity, or no value of the knob meets it.
    """
    rule = resolve(allocator)
    if not isinstance(rule, Allocator) or not rule.on_weights:
        known = ", ".join(name for name, other in RULES.items() if other.on_weights)
        raise SettingError(f"masks: expected a rule for single weights, got {rule!r}. Use one of {known}.")
    graph: Any = weights  # allocators read only `groups` and `cost` of a graph, and `Weights` has both
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
