"""Uniform pruning: remove the same fraction of every group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.checks import fraction
from secateur.allocators.limits import Limits
from secateur.allocators.ranking import ascending
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction
from secateur.errors import SettingError
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


@dataclass(frozen=True)
class Uniform(Allocator):
    """Removes the same fraction of every group: the ``floor(ratio * N)`` units with the lowest scores.

    This is the baseline: other allocators should be better at the same budget. With a budget, the ratio is
    solved.

    Attributes:
        ratio: Fraction to remove, in [0, 1). None if a budget decides.
        removal: Signal whose lowest scores are removed first: a name such as ``"l1*wasserstein"``, or an
            instance.

    Raises:
        SettingError: `ratio` is out of range; on `allocate`, both or neither of ratio and budget is given.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> scores = {"magnitude": {"0": np.array([5.0, 1, 6, 2, 7, 8, 9, 3])}}
        >>> sc.Uniform(ratio=0.25).allocate(graph, scores).groups[0].removed
        (1, 3)
        >>> sc.Uniform().allocate(graph, scores, sc.Budget(params=0.5)).groups[0].kept
        3
    """

    ratio: float | None = None
    removal: SignalLike = "magnitude"
    name: ClassVar[str] = "uniform"
    solved: ClassVar[str] = "ratio"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.ratio is not None:
            object.__setattr__(self, "ratio", fraction("Uniform", "ratio", self.ratio))

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """The ratio."""
        if (self.ratio is None) == (budget is None):
            got = "neither" if budget is None else "both"
            raise SettingError(
                f"Uniform: expected either a ratio or a budget, got {got}. "
                "Write Uniform(ratio=0.25), or Uniform() with a budget."
            )
        return self.ratio

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The ratio that was used, and the signal."""
        return {"ratio": None if knob is None else float(knob), "removal": name_of(self.removal)}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """From ratio k / N on, k units are removed.

        The comparison ``ratio >= k / N`` is exact for ratios that a user writes: 29 / 100 is the same float
        as 0.29. The product ``ratio * N`` would have a rounding error.
        """
        found: dict[str, StepFunction] = {}
        for group in limits.considered(graph.groups):
            count = limits.feasible(group.size)
            order = ascending(vector(scores, self.removal, group))
            found[group.name] = StepFunction(order=order, knob=count / group.size, count=count)
        return found
