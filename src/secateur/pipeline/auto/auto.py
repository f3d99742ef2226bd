"""The allocators that ``allocator="auto"`` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from secateur.allocators import EMP, Budget, Global, Repairability, RepairAware, ToD, Uniform, resolve
from secateur.allocators.registry import Allocates
from secateur.errors import SettingError
from secateur.pipeline.auto.choose import choose
from secateur.pipeline.auto.chooser import Choice, Chooser
from secateur.pipeline.auto.depth import PARTS
from secateur.pipeline.auto.search import ONLY_UNITS, Search
from secateur.pipeline.auto.streams import StreamsWhole
from secateur.targets.granularity import UNITS as OF_UNITS
from secateur.targets.granularity import refusal

if TYPE_CHECKING:
    from secateur.pipeline.targets.target import Scored, Target

UNITS: Mapping[str, Callable[[], Allocates]] = MappingProxyType(
    {
        "repair_aware": RepairAware,
        "repair_aware, streams whole": lambda: StreamsWhole(RepairAware()),
        "repair_aware by depth": lambda: RepairAware(parts=PARTS),
        "repair_aware by params": lambda: RepairAware(per="params"),
        "global, reconstruction": lambda: Global(removal="reconstruction"),
        "global, fisher": lambda: Global(removal="fisher"),
        "global, magnitude": Global,
        "tod": ToD,
        "tod, reconstruction and fisher": lambda: ToD(removal="reconstruction", protection="fisher"),
        "emp": EMP,
        "repairability": Repairability,
        "uniform, reconstruction": lambda: Uniform(removal="reconstruction"),
        "uniform, magnitude x wasserstein": lambda: Uniform(removal="magnitude*wasserstein"),
    }
)
"""Candidates for units, by the name that the report shows."""


@dataclass(frozen=True)
class Auto(Chooser):
    """Compares several allocators and uses the best one.

    Each candidate prunes the model, is repaired on a part of the data, and is measured on held-out data. Pass
    `Auto`, or its name ``"auto"``, as `allocator` to `sc.prune`. Which candidate wins depends on the model,
    the data, the budget and the repair. ``"auto"`` is the default for units. Single weights and experts have
    other candidates.

    Attributes:
        candidates: Allocators or their names, by the name that the report shows. None: the allocators of all
            papers and the repair-aware one, with several removal signals. A candidate does not run if the
            data lack something that it needs, for example labels.
        finalists: Largest number of candidates in the last round, which uses more data.
        minutes: After the comparison, `Search` moves budget between groups for this long, and the best of all
            is used. For units only. None: no search.

    Raises:
        SettingError: There is no candidate, a candidate is no allocator, or `finalists` is below 1.

    Example:
        >>> Auto(candidates={"small tolerance": ToD(), "even": "uniform"}).rules["even"]
        Uniform(ratio=None, removal='magnitude')
    """

    candidates: Mapping[str, str | Allocates] | None = None
    finalists: int = 3
    minutes: float | None = None
    name: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.candidates is not None and not self.candidates:
            raise SettingError(
                "auto: expected at least one candidate, got none. Pass rules by name, or leave it out."
            )
        if type(self.finalists) is not int or self.finalists < 1:
            raise SettingError(f"auto: expected finalists of at least 1, got {self.finalists!r}. Pass 3.")
        if self.minutes is not None:
            Search(minutes=self.minutes)  # raises an error for a wrong number
        if self.candidates is not None:
            object.__setattr__(self, "candidates", MappingProxyType(dict(self.candidates)))
        _ = self.rules  # raises an error for an unknown name now, not during pruning

    @property
    def rules(self) -> dict[str, Allocates]:
        """The allocators to compare for units."""
        return self._candidates(UNITS, resolve)

    def check(self, function: str, granularity: str) -> None:
        """Raise SettingError for a search if the granularity is not one of units."""
        if self.minutes is not None and granularity not in OF_UNITS:
            raise refusal(f"{function}(allocator=Auto(minutes={self.minutes}))", granularity, ONLY_UNITS)

    def candidates_for(self, target: Target) -> dict[str, Any]:
        """The allocators to compare for a target, and those that a later search starts from."""
        found = self._candidates(target.candidates, target.rule)
        return found if self.minutes is None else {**Search().candidates_for(target), **found}

    def choose(self, target: Target, budget: Budget | None = None, known: Scored | None = None) -> Choice:
        """Measure the plans of all candidates in at most two rounds (`choose.choose`), and then search."""
        known = target.score_candidates(self.candidates_for(target).values()) if known is None else known
        found = choose(
            self._candidates(target.candidates, target.rule), self.finalists, target, budget, known
        )
        return found if self.minutes is None else Search(minutes=self.minutes).after(found, target, known)

    def _candidates(
        self, default: Mapping[str, Callable[[], Any]], resolved: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """The allocators to compare.

        Args:
            default: Used if no candidates were given: functions that make an allocator, by name.
            resolved: Turns the name of a given candidate, or the candidate itself, into an allocator.
        """
        if self.candidates is None:
            return {name: make() for name, make in default.items()}
        return {name: resolved(rule) for name, rule in self.candidates.items()}
