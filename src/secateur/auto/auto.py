"""The candidates of a choice among rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from secateur.allocate import EMP, Global, Repairability, RepairAware, ToD, Uniform, resolve
from secateur.allocate.registry import Allocates
from secateur.auto.streams import StreamsWhole
from secateur.errors import SettingError

UNITS: Mapping[str, Callable[[], Allocates]] = MappingProxyType(
    {
        "repair_aware": RepairAware,
        "repair_aware, streams whole": lambda: StreamsWhole(RepairAware()),
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
"""What ``auto`` compares for units."""


@dataclass(frozen=True)
class Auto:
    """Chooses a rule: each candidate is applied, repaired on part of the data and measured on held-out data.

    Pass it, or its name ``"auto"``, as `allocator` to `sc.prune`. It is no rule itself: which rule wins
    depends on the model, the data, the budget and the repair. For units it is the default; single weights
    and experts have candidates of their own.

    Attributes:
        candidates: By the name that the report shows; rules, or their names. The default takes every paper's
            rule and the repair-aware one, with several removal signals. Candidates that the data cannot feed,
            for want of labels say, do not run.
        finalists: How many run in the last round, on more data, at most.

    Raises:
        SettingError: There is no candidate, one is no rule, or `finalists` is below 1.

    Example:
        >>> Auto(candidates={"small tolerance": ToD(), "even": "uniform"}).rules["even"]
        Uniform(ratio=None, removal='magnitude')
    """

    candidates: Mapping[str, str | Allocates] | None = None
    finalists: int = 3
    name: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.candidates is not None and not self.candidates:
            raise SettingError(
                "auto: expected at least one candidate, got none. Pass rules by name, or leave it out."
            )
        if type(self.finalists) is not int or self.finalists < 1:
            raise SettingError(f"auto: expected finalists of at least 1, got {self.finalists!r}. Pass 3.")
        if self.candidates is not None:
            object.__setattr__(self, "candidates", MappingProxyType(dict(self.candidates)))
        _ = self.rules  # a wrong name is refused now

    @property
    def rules(self) -> dict[str, Allocates]:
        """The candidates for units as rules."""
        return self.rules_or(UNITS, resolve)

    def rules_or(
        self, default: Mapping[str, Callable[[], Any]], called: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """The candidates as rules, or these.

        Args:
            default: Makes each, by the name that the report shows, where no candidates were given.
            called: Name or rule -> rule.
        """
        if self.candidates is None:
            return {name: make() for name, make in default.items()}
        return {name: called(rule) for name, rule in self.candidates.items()}
