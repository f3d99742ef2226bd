"""Plans of one rule and one scoring, each made for the share of the dense cost that it keeps."""

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

_LARGEST = 1 - 1e-9
"""The largest share that a budget can ask for."""


@dataclass(frozen=True, eq=False)
class Plans:
    """Makes a plan for any share of one cost that it is to keep.

    The cost is MACs for units, the number of experts for experts, and so on. If the budget bounds another
    counted cost, it is that one.

    Attributes:
        target: What is removed.
        rule: The allocator, with the curves it measured.
        scores: The scores that it reads.
        budget: All bounds. Every plan meets the counted ones (MACs, parameters, ...).
    """

    target: Target
    rule: Any
    scores: Scores
    budget: Budget

    @cached_property
    def cost(self) -> str:
        """The field of `Budget` that differs from plan to plan."""
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

    def bound_for(self, share: float) -> dict[str, JsonValue]:
        """The bound that `counted` adds to the budget for a share, by its name."""
        return {self.cost: 1 - share if self.cost == "sparsity" else share}

    def counted(self, share: float) -> Budget:
        """The budget of the plan that keeps this share: only counted bounds, none that must be measured."""
        share = min(share, _LARGEST)
        bound: dict[str, Any] = self.bound_for(share)
        return self.budget.counted(**bound)

    def plan(self, share: float) -> Any:
        """Make the plan that keeps this share.

        Raises:
            UnreachableBudgetError: No plan keeps so little. `smallest` is the smallest share of all plans.
        """
        try:
            return self.target.allocate(self.rule, self.scores, self.counted(share))
        except UnreachableBudgetError as error:
            raise self._with_share_kept(error) from error

    def plan_and_apply(self, share: float) -> tuple[nn.Module, Any]:
        """Make the plan that keeps this share, and apply it. Raises as `plan` does."""
        try:
            return self.target.plan_and_apply(self.rule, self.scores, self.counted(share))
        except UnreachableBudgetError as error:
            raise self._with_share_kept(error) from error

    def _with_share_kept(self, error: UnreachableBudgetError) -> UnreachableBudgetError:
        """Convert the smallest reachable sparsity to a kept share."""
        if self.cost != "sparsity":
            return error
        return UnreachableBudgetError(str(error), 1 - error.smallest)
