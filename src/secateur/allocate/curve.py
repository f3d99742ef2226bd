"""What a rule's knob does, at every value that changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocate.limits import Limits
from secateur.allocate.step_function import StepFunction
from secateur.errors import SettingError

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


@dataclass(frozen=True, eq=False)
class Curve:
    """Cost and kept units against a rule's knob: for `ToD` the tolerance, for `Uniform` the ratio.

    Each point holds from its value of the knob up to the next point's. The first is the dense model: its
    value is minus infinity, because below the second point's value nothing goes. Costs never rise.

    It depends on the graph, the scores, the rule's signals and the limits, not on where the knob stands:
    every plan made from the same scores is one point of it, or beside one where a budget was spent.

    Attributes:
        allocator: The rule's name.
        groups: Names of the considered groups. [groups]
        sizes: Their units before. [groups]
        knob: Values of the knob, strictly ascending, the first -inf. [points]
        params: Parameters. [points]
        macs: Multiply-accumulate operations for one sample. [points]
        kept: Units that stay. [points, groups]
        knob_name: What the knob is called.
    """

    allocator: str
    groups: tuple[str, ...]
    sizes: NDArray[np.int64]
    knob: NDArray[np.float64]
    params: NDArray[np.int64]
    macs: NDArray[np.int64]
    kept: NDArray[np.int64]
    knob_name: str = "knob"

    def __len__(self) -> int:
        """Number of points."""
        return len(self.knob)

    def at(self, knob: float) -> int:
        """The point that holds at this value of the knob.

        Raises:
            SettingError: The value is not a number.
        """
        if np.isnan(knob):
            raise SettingError(f"curve: expected a value of the knob, got {knob}. Give a number.")
        return int(np.searchsorted(self.knob, knob, side="right")) - 1

    def spread(self, most: int) -> NDArray[np.int64]:
        """At most `most` points, ascending, that lie about evenly in MACs; the first and the last among them.

        Raises:
            SettingError: `most` is below 2.
        """
        if most < 2:
            raise SettingError(f"curve: expected at least 2 points, got {most}. Ask for 20, for example.")
        targets = np.linspace(self.macs[0], self.macs[-1], most)
        # The first point at or below each target; MACs fall, so their negatives are ascending.
        found = np.searchsorted(-self.macs, -np.floor(targets))
        return np.unique(np.append(found[:-1], len(self) - 1))

    def to_dict(self) -> dict[str, JsonValue]:
        """All of it as plain values, ready for JSON; the first value of the knob is None."""
        return {
            "allocator": self.allocator,
            "groups": [{"name": n, "units": int(s)} for n, s in zip(self.groups, self.sizes, strict=True)],
            "knob": [None, *self.knob[1:].tolist()],
            "params": self.params.tolist(),
            "macs": self.macs.tolist(),
            "kept": self.kept.tolist(),
        }


def curve(
    allocator: str, graph: Graph, limits: Limits, steps: Mapping[str, StepFunction], knob_name: str = "knob"
) -> Curve:
    """The curve of a rule with these step functions; one evaluation of the cost for all points together."""
    knob = np.unique(np.concatenate([function.knob for function in steps.values()] or [np.empty(0)]))
    sizes = np.array([len(function.order) for function in steps.values()], dtype=np.int64)
    removed = np.zeros((len(knob) + 1, len(steps)), dtype=np.int64)
    for column, function in enumerate(steps.values()):
        allowed = [limits.removable(len(function.order), int(count)) for count in function.count]
        removed[1:, column] = np.array([0, *allowed])[np.searchsorted(function.knob, knob, side="right")]
    # Limits lower counts, so not every value that a rule names changes anything.
    changes = np.append(True, (removed[1:] != removed[:-1]).any(axis=1))
    knob, removed = np.append(-np.inf, knob)[changes], removed[changes]
    gone: dict[str, NDArray[np.int64]] = {}
    for column, (name, function) in enumerate(steps.items()):
        gone[name] = np.empty(len(function.order), dtype=np.int64)
        # The unit at place j is gone from the first point on at which more than j are.
        places = np.arange(len(function.order))
        gone[name][function.order] = np.searchsorted(removed[:, column], places, side="right")
    params, macs = graph.sweep(gone, len(knob))
    return Curve(allocator, tuple(steps), sizes, knob, params, macs, sizes - removed, knob_name)
