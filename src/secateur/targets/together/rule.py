"""One rule for units and one for experts or blocks, so that one budget decides on both."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.checks import fraction
from secateur.allocators.curve import Curve, curve
from secateur.allocators.decision import Decision, decide
from secateur.allocators.description import Certificate, Description
from secateur.allocators.limits import Limits
from secateur.allocators.registry import RULES as OF_UNITS
from secateur.allocators.signals import ScoreTable
from secateur.allocators.step_function import StepFunction
from secateur.common.formatting import percent
from secateur.errors import BudgetError, NothingToPruneError, SettingError, UnreachableBudgetError
from secateur.graph.graph import Graph
from secateur.signals.units.combination import SignalLike, name_of
from secateur.targets.defaults import BLOCKS, EXPERTS

if TYPE_CHECKING:
    from secateur.targets.together.graph import Joined

What = Literal["expert", "block"]

ONE_KNOB = ("tod", "emp", "uniform", "random")
"""The rules whose knob means the same for units and for experts."""

DEFAULTS: Mapping[What, Mapping[str, Allocator]] = MappingProxyType({"expert": EXPERTS, "block": BLOCKS})
"""What a rule's name stands for where experts, or blocks, are decided on."""

FREE: Mapping[What, str] = MappingProxyType({"expert": "weight_norm", "block": "magnitude"})
"""A signal that needs no data, for what stays whole anyway."""

SHARE = 0.5
"""The share of the saving that blocks have where none is given."""


@dataclass(frozen=True)
class Pair:
    """A signal for units, and the one for experts or blocks that stands in its place.

    Attributes:
        unit: For groups of units.
        other: For groups of experts or blocks.
    """

    unit: SignalLike
    other: Any

    @property
    def name(self) -> str:
        """``wasserstein | reap``."""
        return f"{name_of(self.unit)} | {name_of(self.other)}"


@dataclass(frozen=True)
class Together(Allocator):
    """Decides on units by one rule, and on experts or blocks by another one.

    Without a share, both have the same knob: with ToD one tolerance gives each layer its number of units and
    each block its number of experts; with Uniform both lose the same fraction.

    With a share s and a budget, experts or blocks come first. They go in their rule's order, as long as they
    save no more than s of what is to be saved. Units then save the rest, by their own rule, with the costs
    that they have where these experts or blocks are gone. With s = 1 units stay whole, and with s = 0 only
    units go.

    Attributes:
        units: The rule for groups of units. Its settings count.
        others: The rule for groups of experts or blocks.
        share: The share of the saving, in [0, 1]; None: one knob.
        what: ``expert`` or ``block``.
    """

    units: Allocator
    others: Allocator
    share: float | None = None
    what: What = field(default="expert", kw_only=True)

    def __post_init__(self) -> None:
        """Check the share, or that both rules have the same knob."""
        if self.share is not None:
            object.__setattr__(self, "share", fraction("allocator", "share", self.share, one=True))
        known = {rule.name for rule in map(OF_UNITS.__getitem__, ONE_KNOB)}
        if self.share is None and (self.units.name != self.others.name or self.units.name not in known):
            raise SettingError(
                f"allocator: expected one rule for units and {self.what}s, {_known()}, got "
                f"{self.units.name!r} for units and {self.others.name!r} for {self.what}s. Name one of "
                f"these, or say which share of the saving {self.what}s have: "
                f'{{"unit": sc.RepairAware(), "{self.what}": {_beside("", self.what)!r}, "share": 0.5}}.'
            )

    @classmethod
    def of(cls, rule: Any, what: What = "expert") -> Together:
        """Make the rule for both kinds from a name, a rule for units, or a mapping with both rules.

        Args:
            rule: What the user passed. A mapping has rules by what they decide on, and perhaps ``share``.
            what: What is decided on beside units.

        Raises:
            SettingError: It is none of these, or its knob means nothing for both.
        """
        if isinstance(rule, Together):
            return rule
        share = None if what == "expert" else SHARE
        example = f'{{"unit": sc.ToD(), "{what}": {DEFAULTS[what]["tod"]!r}}}'
        if isinstance(rule, Mapping) and {"unit", what} <= set(rule) <= {"unit", what, "share"}:
            wrong = [rule[name] for name in ("unit", what) if not isinstance(rule[name], Allocator)]
            if wrong:
                raise SettingError(
                    f"allocator: expected two rules in the mapping, got {wrong[0]!r}. Write {example}."
                )
            return cls(rule["unit"], rule[what], rule.get("share", share), what=what)
        known = ONE_KNOB if share is None else tuple(OF_UNITS)
        if isinstance(rule, str) and rule in known:
            return cls(OF_UNITS[rule], _beside(rule, what), share, what=what)
        if isinstance(rule, Allocator) and (share is not None or rule.name in known):
            return cls(rule, _beside(rule.name, what), share, what=what)
        raise SettingError(
            f"allocator: expected one of {', '.join(known)} for units and {what}s together, got {rule!r}. "
            + (
                f"Other rules compare scores or errors, and those of units and {what}s have no common scale. "
                if share is None
                else ""
            )
            + f"Name one, or write {example}."
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the rule for units."""
        return self.units.name

    @property
    def solved(self) -> str:  # type: ignore[override]
        """As for the rule for units."""
        return self.units.solved

    @property
    def knob_name(self) -> str:  # type: ignore[override]
        """As for the rule for units."""
        return self.units.knob_name

    @property
    def spends(self) -> bool:  # type: ignore[override]
        """As for the rule for units."""
        return self.units.spends

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The signals of both rules, paired by their use. What stays whole gets a signal without data."""
        units = ("magnitude",) if self.share == 1 else self.units.signals
        others = (FREE[self.what],) if self.share == 0 else self.others.signals
        found = zip_longest(units, others)
        return tuple(
            Pair(units[-1] if unit is None else unit, others[-1] if other is None else other)
            for unit, other in found
        )

    @property
    def signals(self) -> tuple[Any, ...]:
        """`pairs`."""
        return self.pairs

    def of_units_alone(self, graph: Graph, scores: ScoreTable) -> dict[str, dict[str, NDArray[np.float64]]]:
        """The scores of units by their own signals: what their rule reads."""
        return {
            name_of(pair.unit): {group.name: scores[pair.name][group.name] for group in graph.groups}
            for pair in self.pairs
            if pair.name in scores
        }

    def knob(self, budget: Budget | None) -> float | None:
        """The knob of the rule for units."""
        return self.units.knob(budget)

    def for_budget(self, budget: Budget | None) -> Together:
        """Both rules with what follows from the budget."""
        return replace(self, units=self.units.for_budget(budget), others=self.others.for_budget(budget))

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The settings of both rules, and the share."""
        found = {**self.units.settings(knob), f"{self.what}s": self.others.settings(knob)}
        if self.share is not None:  # the knobs are two
            found |= {f"{self.what}s": self.others.settings(None), "share": self.share}
        return found

    def describe(self, certificates: Mapping[str, Any]) -> Description:
        """As for the rule for units; the certificate says how many units and others are removed."""
        found = self.units.describe({})
        return replace(found, certificate=self.certificate(certificates)) if certificates else found

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """For units and for others: how many are removed, of how many, and the parameters and MACs saved.

        The others are counted first. So units are counted in the model without these.
        """
        both = cast("Joined", graph)
        names = {group.name for group in both.others.groups}
        keep, before = dict[str, Any](), both.cost()
        found: dict[str, JsonValue] = {}
        for axis, some in (
            (self.what, [g for g in both.groups if g.name in names]),
            ("unit", both.units.groups),
        ):
            keep |= {group.name: decision.keep[group.name] for group in some if group.name in decision.keep}
            after = both.cost(keep)
            found[axis] = {
                "removed": sum(decision.removed.get(group.name, 0) for group in some),
                "of": sum(group.size for group in some),
                "params": (before.params - after.params) / max(1, both.cost().params),
                "macs": (before.macs - after.macs) / max(1, both.cost().macs),
            }
            before = after
        return {"axes": found}

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """Say how many units and others are removed, and what this saves."""
        axes = found.get("axes", {})
        if not all({"removed", "of", "params", "macs"} <= axis.keys() for axis in axes.values()):
            return super().certificate(found)
        return Certificate(
            sentences=("One budget is spent along both axes.",),
            note="Axes are counted one after the other: what is removed along the first saves its units too.",
            titles=("axis", "removed", "parameters saved", "MACs saved"),
            rows=tuple(
                (
                    f"{name}s",
                    f"{a['removed']:,} of {a['of']:,}",
                    percent(a["params"], 1),
                    percent(a["macs"], 1),
                )
                for name, a in axes.items()
            ),
        )

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The step functions of both rules, each on its own groups and by its own signals.

        Raises:
            SettingError: The knobs of the rules are two.
        """
        if self.units.name != self.others.name:
            raise SettingError(
                f"curve: expected one knob for units and {self.what}s, got those of {self.units.name} and "
                f"{self.others.name}. Call allocate with several budgets."
            )
        both = cast("Joined", graph)
        return {**self._of_units(both.units, both, scores, limits), **self._of_others(both, scores, limits)}

    def decide(self, graph: Graph, scores: ScoreTable, budget: Budget | None, limits: Limits) -> Decision:
        """Decide how many units and others each considered group loses."""
        if self.share is None:
            return super().decide(graph, scores, budget, limits)
        both = cast("Joined", graph)
        share = self._share_within(both, limits, self.share)
        first = self._first(both, scores, budget, limits, share)
        rest = both.given(first.keep)
        steps = {} if share == 1 else self._of_units(rest, both, scores, limits)
        bounds = None if budget is None else _counted(budget, both)
        none = dict.fromkeys(steps, 0)
        then = Decision(None, budget, steps, none, none)
        if steps and (budget is None or bounds is not None):  # else units are whole, or nothing bounds them
            try:
                then = decide(rest, bounds, limits, steps, self.units.knob(budget))
            except UnreachableBudgetError as error:
                raise self._in_shares(error, cast(Budget, budget), both) from error
        # On the curve, all experts or blocks are removed before the first unit.
        knobs = [float(function.knob[0]) for function in steps.values() if len(function.knob)]
        start = np.nextafter(min(knobs, default=0.0), -np.inf)
        path = {name: _lowered(function, limits) for name, function in steps.items()}
        path |= {
            name: StepFunction(function.order, np.array([start]), np.array([first.removed[name]]))
            for name, function in first.steps.items()
        }
        turned, removed = {**then.turned, **first.turned}, {**then.removed, **first.removed}
        return Decision(then.knob, budget, path, turned, removed)

    def _curve(self, graph: Graph, limits: Limits, steps: Mapping[str, StepFunction]) -> Curve:
        """With a share, `steps` are within the limits, which are not the same for both."""
        return super()._curve(graph, limits if self.share is None else Limits(max_ratio=1 - 1e-12), steps)

    def _share_within(self, both: Joined, limits: Limits, share: float) -> float:
        """The share within the limits: 1 if no units may be removed, 0 if no experts or blocks may.

        Raises:
            NothingToPruneError: The whole saving is for a kind that may not be removed.
        """
        units, others = (self._ignored(part, both, limits) for part in (both.units, both.others))
        if (share == 0 and units is None) or (share == 1 and others is None):
            alone = "units" if share == 0 else f"{self.what}s"
            raise NothingToPruneError(
                f"allocate: expected {alone} that may go, which are to save all (share={share:g}), got none: "
                "limits keep them. Ignore fewer, or take another share."
            )
        return 1.0 if units is None else 0.0 if others is None else share

    def _first(
        self, both: Joined, scores: ScoreTable, budget: Budget | None, limits: Limits, share: float
    ) -> Decision:
        """What experts or blocks lose, with the share that they have."""
        graph, limits = cast(Graph, both), both.limits_of_others(limits)
        own = None if budget is None else getattr(budget, f"{self.what}s")
        if share == 0:
            if own is not None:
                raise BudgetError(
                    f"allocate: expected {self.what}s that may go for Budget({self.what}s={own}), got none: "
                    "units alone decide here, or limits keep them. Leave that bound out."
                )
            return Decision(None, budget, {}, {}, {})
        steps, knob = self._of_others(both, scores, limits), self.others.knob(budget)
        if budget is None or own is not None or share == 1:
            bounds = budget if share == 1 or own is None else Budget(**{f"{self.what}s": own})
            return decide(graph, bounds, limits, steps, knob)
        points, dense = curve(self.others.name, graph, limits, steps), both.cost()
        within = np.ones(len(points), dtype=bool)
        for name, most in budget.targets(dense).items():
            whole = getattr(dense, name)
            within &= whole - getattr(points, name) <= share * (whole - most)
        at = int(np.flatnonzero(within)[-1])
        kept = dict(zip(points.groups, points.kept[at].tolist(), strict=True))
        removed = {name: len(function.order) - kept[name] for name, function in steps.items()}
        return Decision(float(points.knob[at]) if at else None, budget, steps, removed, removed)

    def _in_shares(
        self, error: UnreachableBudgetError, budget: Budget, both: Joined
    ) -> UnreachableBudgetError:
        """The error with `smallest` in the form of the budget, if that is a share of the dense cost."""
        message = (
            f"{error} This is the cost without the {self.what}s that are removed first, which save up to "
            f"{self.share:g} of what the budget saves; another share may reach it."
        )
        name = "macs" if budget.macs is not None else "params"
        if not isinstance(getattr(budget, name), float):
            return UnreachableBudgetError(message, error.smallest)
        return UnreachableBudgetError(message, error.smallest / max(1, getattr(both.cost(), name)))

    def _of_units(
        self, part: Graph, both: Joined, scores: ScoreTable, limits: Limits
    ) -> Mapping[str, StepFunction]:
        return self._side(self.units, part, lambda pair: pair.unit, both, scores, limits)

    def _of_others(self, both: Joined, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        part = cast(Graph, both.others)
        return self._side(self.others, part, lambda pair: pair.other, both, scores, limits)

    def _side(
        self,
        rule: Allocator,
        part: Graph,
        side: Callable[[Pair], SignalLike],
        both: Joined,
        scores: ScoreTable,
        limits: Limits,
    ) -> Mapping[str, StepFunction]:
        """The step functions of one rule; none where all of its groups are ignored."""
        ignored = self._ignored(part, both, limits)
        if ignored is None:
            return {}
        some = {name_of(side(pair)): scores[pair.name] for pair in self.pairs if pair.name in scores}
        return rule.steps(part, some, replace(limits, ignore=tuple(map(glob.escape, ignored))))

    @staticmethod
    def _ignored(part: Any, both: Joined, limits: Limits) -> list[str] | None:
        """The groups of one side that have to stay whole; None if all have."""
        considered = {group.name for group in limits.considered(both.groups)}
        ignored = [group.name for group in part.groups if group.name not in considered]
        return ignored if len(ignored) < len(part.groups) else None


def _lowered(function: StepFunction, limits: Limits) -> StepFunction:
    """The step function with numbers that the limits allow."""
    size = len(function.order)
    count = [limits.removable(size, int(k)) for k in function.count]
    return StepFunction(function.order, function.knob, np.array(count, dtype=np.int64))


def _counted(budget: Budget, both: Joined) -> Budget | None:
    """The bounds on parameters and MACs in absolute numbers; None if there is none."""
    dense = both.cost()
    found = {name: max(1, most) for name, most in budget.targets(dense).items() if name in ("params", "macs")}
    return Budget(**found, spend=budget.spend) if found else None  # type: ignore[arg-type]


def _beside(name: str, what: What) -> Allocator:
    """The rule for experts or blocks beside a rule for units of this name."""
    return DEFAULTS[what].get(name, DEFAULTS[what]["global"])


def _known() -> str:
    return "one of " + ", ".join(ONE_KNOB)
