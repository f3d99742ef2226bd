"""Pruning ratios that the user gives for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.checks import fraction
from secateur.allocators.decision import Decision
from secateur.allocators.description import Certificate
from secateur.allocators.limits import Limits
from secateur.allocators.naming import covers, layers_of, matching
from secateur.allocators.ranking import ascending
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction
from secateur.common.formatting import share
from secateur.errors import SettingError
from secateur.graph.groups import Group
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


@dataclass(frozen=True)
class Ratios(Allocator):
    """Removes a given fraction of each layer: ``floor(ratio * N)`` of its N units.

    A layer that no pattern matches loses nothing. With a budget, all ratios are multiplied by one factor,
    which is solved for the budget.

    Attributes:
        ratios: Fraction to remove, in [0, 1), by name. A name is a shell pattern (``*``, ``?``) for a group
            or for a layer that produces its units. The name of a module stands for all layers in it. If
            several patterns match a layer, the last one decides.
        removal: Signal whose lowest scores are removed first: a name such as ``"l1*wasserstein"``, or an
            instance.

    Raises:
        SettingError: A ratio is out of range. On `allocate`: there is no ratio, a pattern matches nothing, or
            layers that can only lose units together have different ratios.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> scores = sc.score(graph, None, "magnitude")
        >>> plan = sc.Ratios({"*": 0.25, "1": 0.5}).allocate(graph, scores)
        >>> [(group.name, group.kept) for group in plan.groups]
        [('0', 6), ('1', 4)]
    """

    ratios: Mapping[str, float] = field(default_factory=dict)
    removal: SignalLike = "magnitude"
    name: ClassVar[str] = "ratios"
    solved: ClassVar[str] = "factor"

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.ratios, Mapping) or not all(isinstance(name, str) for name in self.ratios):
            raise SettingError(
                f"Ratios: expected a mapping from names to fractions, got {self.ratios!r}. "
                'Write Ratios({"layer*.conv1": 0.5}), for example.'
            )
        checked = {name: fraction("Ratios", name, value) for name, value in self.ratios.items()}
        object.__setattr__(self, "ratios", checked)

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """The factor on all ratios without a budget: 1."""
        if not any(self.ratios.values()):
            raise SettingError(
                "Ratios: expected a ratio above 0 for at least one layer, got none. "
                'Write Ratios({"layer*.conv1": 0.5}), for example.'
            )
        return 1.0

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The ratios, the factor that was used and the signal."""
        return {
            "ratios": dict(self.ratios),
            "factor": None if knob is None else float(knob),
            "removal": name_of(self.removal),
        }

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """Of N units, k are removed from the factor k / N / ratio on."""
        found = {}
        for group, ratio in self._given(graph, limits).items():
            count = limits.feasible(group.size)
            order = ascending(vector(scores, self.removal, group))
            found[group.name] = StepFunction(order, count / group.size / ratio, count)
        return found

    def _given(self, graph: Graph, limits: Limits) -> dict[Group, float]:
        """The considered groups with a ratio above 0, and this ratio.

        Patterns are matched against all groups, ignored ones too. So a pattern is no error if it matches only
        ignored groups.
        """
        by_pattern = {
            pattern: {
                g.name for g in matching("Ratios: expected each name to match a layer", pattern, graph.groups)
            }
            for pattern in self.ratios
        }
        found = {}
        for group in limits.considered(graph.groups):
            by_layer: dict[str, float] = {}
            for pattern, ratio in self.ratios.items():
                if group.name in by_pattern[pattern]:
                    names = dict.fromkeys((group.name, *layers_of(group)))
                    by_layer |= {name: ratio for name in names if covers(pattern, name)}
            if len({*by_layer.values()}) > 1:
                given = ", ".join(f"{name}: {ratio}" for name, ratio in by_layer.items())
                raise SettingError(
                    f"Ratios: expected one ratio for layers that only lose units together, got {given}. "
                    "Give these layers the same ratio, or name one of them only."
                )
            ratio = next(iter(by_layer.values()), 0.0)
            if ratio:
                found[group] = ratio
        return found

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """For each group: ``asked``, the ratio times the factor, and ``removed``, the removed fraction."""
        factor = decision.knob or 0.0
        return {
            "groups": {
                group.name: {"asked": factor * ratio, "removed": decision.removed[group.name] / group.size}
                for group, ratio in self._given(graph, limits).items()
            }
        }

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """Show the requested and the removed fraction of each layer."""
        groups = found.get("groups", {})
        if not all({"asked", "removed"} <= group.keys() for group in groups.values()):
            return super().certificate(found)
        return Certificate(
            sentences=(
                "Each layer lost the largest number of units within its ratio that the limits allow.",
            ),
            note="Asked is the ratio that was given, times the factor; a budget that is spent to the last "
            "unit lets units come back.",
            titles=("layer", "asked", "removed"),
            rows=tuple((name, share(g["asked"]), share(g["removed"])) for name, g in groups.items()),
        )
