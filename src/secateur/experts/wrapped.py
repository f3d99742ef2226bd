"""Rules that ask another rule and change its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from secateur.allocate.base import Allocator
from secateur.allocate.budget import Budget
from secateur.allocate.description import Description
from secateur.score.combination import Asked


@dataclass(frozen=True)
class Wrapped(Allocator):
    """Goes by another rule's name, signals, knob and settings; a subclass changes the steps.

    Attributes:
        rule: The other rule.
    """

    rule: Allocator

    @property
    def name(self) -> str:  # type: ignore[override]
        """The rule's."""
        return self.rule.name

    @property
    def signals(self) -> tuple[Asked, ...]:
        """The rule's."""
        return self.rule.signals

    def knob(self, budget: Budget | None) -> float | None:
        """The rule's."""
        return self.rule.knob(budget)

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The rule's."""
        return self.rule.settings(knob)

    def describe(self, certificates: Mapping[str, Any]) -> Description:
        """The rule's."""
        return self.rule.describe(certificates)
