"""One rule for units and one for experts that share a knob, so that one budget decides on both."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from pydantic import JsonValue

from secateur.allocators import EMP, Limits, ToD, Uniform
from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.description import Description
from secateur.allocators.signals import ScoreTable
from secateur.allocators.step_function import StepFunction
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.signals.units.combination import Asked, name_of

RULES: Mapping[str, tuple[Allocator, Allocator]] = MappingProxyType(
    {
        "tod": (ToD(), ToD(removal="reap", protection="expert_taylor")),
        "emp": (EMP(), EMP(removal="reap")),
        "uniform": (Uniform(), Uniform(removal="reap")),
        "random": (Uniform(removal="random"), Uniform(removal="random")),
    }
)
"""The rules that can decide on both, for units and for experts: their knobs mean the same for any group."""


@dataclass(frozen=True)
class Pair:
    """A signal for units, and the one for experts that stands in its place.

    Attributes:
        unit: For groups of units.
        expert: For blocks of experts.
    """

    unit: Asked
    expert: Any

    @property
    def name(self) -> str:
        """``wasserstein | reap``."""
        return f"{name_of(self.unit)} | {name_of(self.expert)}"


@dataclass(frozen=True)
class Together(Allocator):
    """Decides on units by one rule and on experts by another one of its kind; both have the same knob.

    With ToD one tolerance gives each layer its number of units and each block its number of experts; with
    Uniform both lose the same fraction.

    Attributes:
        units: The rule for groups of units. Its settings count.
        experts: The rule for blocks of experts.
        only: Decide on units or on experts alone, and leave the others whole; None: on both.
    """

    units: Allocator
    experts: Allocator
    only: Literal["unit", "expert"] | None = None

    def __post_init__(self) -> None:
        """Check that both rules have the same knob."""
        if self.units.name != self.experts.name or self.units.name not in RULES:
            raise SettingError(
                f"allocator: expected one rule for units and experts, {_known()}, got {self.units.name!r} "
                f"for units and {self.experts.name!r} for experts. Name one of these, or write "
                '{"unit": sc.ToD(), "expert": sc.ToD(removal="reap", protection="frequency")}.'
            )

    @classmethod
    def of(cls, rule: Any) -> Together:
        """The rule for both that a name, a rule for units, or a mapping with both stands for.

        Raises:
            SettingError: It is none of these, or its knob means nothing for both.
        """
        if isinstance(rule, Together):
            return rule
        if isinstance(rule, str) and rule in RULES:
            return cls(*RULES[rule])
        if isinstance(rule, Mapping) and set(rule) == {"unit", "expert"}:
            wrong = [each for each in rule.values() if not isinstance(each, Allocator)]
            if wrong:
                raise SettingError(
                    f"allocator: expected two rules in the mapping, got {wrong[0]!r}. Write "
                    '{"unit": sc.ToD(), "expert": sc.ToD(removal="reap", protection="frequency")}.'
                )
            return cls(rule["unit"], rule["expert"])
        if isinstance(rule, Allocator) and rule.name in RULES:
            return cls(rule, RULES[rule.name][1])
        raise SettingError(
            f"allocator: expected {_known()} for units and experts together, got {rule!r}. Other rules "
            "compare scores or errors, and those of units and experts have no common scale."
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of both rules."""
        return self.units.name

    @property
    def solved(self) -> str:  # type: ignore[override]
        """As the rule for units."""
        return self.units.solved

    @property
    def knob_name(self) -> str:  # type: ignore[override]
        """As the rule for units."""
        return self.units.knob_name

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The signals of both, paired by what they are used for. What is left whole needs no data."""
        units = ["magnitude"] * len(self.units.signals) if self.only == "expert" else self.units.signals
        experts = ["weight_norm"] * len(units) if self.only == "unit" else self.experts.signals
        return tuple(map(Pair, units, experts))

    @property
    def signals(self) -> tuple[Any, ...]:
        """The same."""
        return self.pairs

    def knob(self, budget: Budget | None) -> float | None:
        """The knob of the rule for units."""
        return self.units.knob(budget)

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The settings of both rules."""
        return {**self.units.settings(knob), "experts": self.experts.settings(knob)}

    def describe(self, certificates: Mapping[str, Any]) -> Description:
        """As the rule for units, without a certificate: it would be about some of the groups."""
        return self.units.describe({})

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The step functions of both rules, each on its own groups and by its own signals."""
        both: Any = graph
        sides: dict[str, tuple[Allocator, Any, Callable[[Pair], Asked]]] = {
            "unit": (self.units, both.units, lambda pair: pair.unit),
            "expert": (self.experts, both.experts, lambda pair: pair.expert),
        }
        considered = {group.name for group in limits.considered(both.groups)}
        found: dict[str, StepFunction] = {}
        for granularity, (rule, part, side) in sides.items():
            ignored = [group.name for group in part.groups if group.name not in considered]
            if self.only in (None, granularity) and len(ignored) < len(part.groups):
                some = {name_of(side(pair)): scores[pair.name] for pair in self.pairs if pair.name in scores}
                within = replace(limits, ignore=tuple(map(glob.escape, ignored)))
                found |= rule.steps(part, some, within)
        return found


def _known() -> str:
    return "one of " + ", ".join(RULES)
