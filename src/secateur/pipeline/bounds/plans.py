"""The plans of one rule from one scoring, by the share of the dense cost that they keep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import JsonValue
from torch import nn

from secateur.allocators import Budget
from secateur.errors import UnreachableBudgetError
from secateur.pipeline.targets.target import Target
from secateur.signals import Scores

COUNTED = ("macs", "params", "experts", "blocks", "sparsity")

_ALL = 1 - 1e-9
"""The largest share that a budget can ask for."""


@dataclass(frozen=True, eq=False)
class Plans:
    """Plans by what they keep of one cost: MACs of units, experts, weights that are not zero.

    That cost is the one that the budget also bounds, if it bounds one; else the target's own.

    Attributes:
        target: What is removed.
        rule: The allocator, with the curves it measured.
        scores: The scores that it reads.
        budget: All bounds. Those that are counted hold for every plan.
    """

    target: Target
    rule: Any
    scores: Scores
    budget: Budget

    @cached_property
    def cost(self) -> str:
        """The field of `Budget` whose bound is varied."""
        given = [name for name in COUNTED if getattr(self.budget, name) is not None]
        own = next(iter(self.target.budgets[0].as_settings()))
        return own if own in given or not given else given[0]

    @cached_property
    def most(self) -> float:
        """The largest share of the cost that the counted bounds allow."""
        if getattr(self.budget, self.cost) is None:
            return 1.0
        dense = self.target.prunable.cost()
        ((name, most),) = Budget(**{self.cost: getattr(self.budget, self.cost)}).targets(dense).items()
        return min(1.0, most / float(max(1, getattr(dense, name))))

    def noted(self, share: float) -> dict[str, JsonValue]:
        """The bound of `counted` by name, for a record."""
        return {self.cost: 1 - share if self.cost == "sparsity" else share}

    def counted(self, share: float) -> Budget:
        """The budget of the plan that keeps this share, whose bounds are all counted."""
        share = min(share, _ALL)
        bound: dict[str, Any] = self.noted(share)
        return self.budget.counted(**bound)

    def plan(self, share: float) -> Any:
        """The plan that keeps this share.

        Raises:
            UnreachableBudgetError: No plan keeps so little. `smallest` is the smallest share that one keeps.
        """
        try:
            return self.target.allocate(self.rule, self.scores, self.counted(share))
        except UnreachableBudgetError as error:
            raise self._in_shares(error) from error

    def plan_and_apply(self, share: float) -> tuple[nn.Module, Any]:
        """The pruned model and the plan that keeps this share. Raises as `plan` does."""
        try:
            return self.target.plan_and_apply(self.rule, self.scores, self.counted(share))
        except UnreachableBudgetError as error:
            raise self._in_shares(error) from error

    def _in_shares(self, error: UnreachableBudgetError) -> UnreachableBudgetError:
        if self.cost != "sparsity":
            return error
        return UnreachableBudgetError(str(error), 1 - error.smallest)
