"""Equally many experts in all blocks, whatever rule says which: what stock Transformers can load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.description import Description
from secateur.allocators.limits import Limits
from secateur.allocators.signals import ScoreTable
from secateur.allocators.step_function import StepFunction
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.signals.units.combination import SignalLike


@dataclass(frozen=True)
class OtherRule(Allocator):
    """Takes name, signals, knob and settings from another rule; a subclass changes the steps.

    Attributes:
        rule: The other rule.
    """

    rule: Allocator

    @property
    def name(self) -> str:  # type: ignore[override]
        """As for the other rule."""
        return self.rule.name

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The rule's."""
        return self.rule.signals

    @property
    def spends(self) -> bool:  # type: ignore[override]
        """As for the other rule."""
        return self.rule.spends

    def knob(self, budget: Budget | None) -> float | None:
        """As for the other rule."""
        return self.rule.knob(budget)

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """As for the other rule."""
        return self.rule.settings(knob)

    def describe(self, certificates: Mapping[str, Any]) -> Description:
        """As for the other rule."""
        return self.rule.describe(certificates)


@dataclass(frozen=True)
class EqualCounts(OtherRule):
    """Removes the same number of experts from each block, in the order of another rule.

    A configuration of Transformers has one number of experts for all layers, so ``from_pretrained`` can load
    the result. The number is the largest that all blocks can keep within the budget.

    Attributes:
        rule: The rule for the order in which the experts of a block are removed.

    Raises:
        SettingError: On `allocate`, there is no budget, or blocks have different numbers of experts.
    """

    @property
    def spends(self) -> bool:  # type: ignore[override]
        """No: what is left of a budget is not spent on an expert of a single block."""
        return False

    def knob(self, budget: Budget | None) -> float | None:
        """Return None: the fraction removed follows from the budget, which is required."""
        if budget is None:
            raise SettingError(
                "EqualCounts: expected a budget, got none. Give Budget(experts=0.75), for example."
            )
        return None

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The settings of the other rule, and the fraction that every block lost."""
        return {**self.rule.settings(None), "equal_counts": True, "ratio": None if knob is None else knob}

    def describe(self, certificates: Mapping[str, Any]) -> Description:
        """As for the other rule; a budget solves for the fraction."""
        return replace(self.rule.describe(certificates), setting="ratio", knob="ratio")

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """K experts of each block go from ratio k / N on."""
        sizes = sorted({group.size for group in limits.considered(graph.groups)})
        if len(sizes) > 1:
            raise SettingError(
                f"EqualCounts: expected blocks with one number of experts, got {sizes}. Leave it out, and "
                "save with secateur.save."
            )
        count = limits.feasible(sizes[0])
        return {
            name: StepFunction(order=function.order, knob=np.asarray(count / sizes[0]), count=count)
            for name, function in self.rule.steps(graph, scores, limits).items()
        }
