"""Blocks of a group that have to stay, whatever rule decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import JsonValue

from secateur.allocators.limits import Limits
from secateur.allocators.signals import ScoreTable
from secateur.allocators.step_function import StepFunction
from secateur.graph.graph import Graph
from secateur.targets.experts.equal import OtherRule


@dataclass(frozen=True)
class Pinned(OtherRule):
    """Takes another rule's steps, but no blocks that have to stay: the next ones in its order go instead.

    Attributes:
        rule: The other rule.
        units: By group the units that stay.
        asked: What the user wrote to say so.
    """

    units: Mapping[str, tuple[int, ...]]
    asked: tuple[str, ...]

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The rule's, and what stays."""
        return {**self.rule.settings(knob), "stay": [*self.asked]}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The rule's step functions, with what stays last in the order."""
        found: dict[str, Any] = {}
        for name, function in self.rule.steps(graph, scores, limits).items():
            stay = np.isin(function.order, self.units.get(name, ()))
            most = limits.removable(len(stay), int((~stay).sum()))
            order = np.concatenate([function.order[~stay], function.order[stay]])
            count = np.minimum(function.count, most)
            new = np.diff(count, prepend=0) > 0
            found[name] = StepFunction(order, function.knob[new], count[new])
        return found
