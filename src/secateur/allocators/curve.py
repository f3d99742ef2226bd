"""The cost curve of an allocator: cost and kept units at every value of its knob."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.limits import Limits
from secateur.allocators.step_function import StepFunction
from secateur.errors import SettingError

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


@dataclass(frozen=True, eq=False)
class Curve:
    """Cost and kept units at every value of an allocator's knob, such as the tolerance of `ToD`.

    A point is valid from its value of the knob up to the value of the next point. The first point is the
    dense model, with the value minus infinity. Costs never rise along the curve.

    The curve depends on the graph, the scores, the signals and the limits, but not on the allocator's own
    setting. Every plan from the same scores is a point of the curve, or near one if units were put back to
    spend a budget.

    Attributes:
        allocator: The allocator's name.
        groups: Names of the considered groups. [groups]
        sizes: Number of units of each group in the dense model. [groups]
        knob: Values of the knob, strictly ascending, the first is -inf. [points]
        params: Number of parameters. [points]
        macs: Multiply-accumulate operations for one sample. [points]
        kept: Number of units that stay. [points, groups]
        knob_name: Name of the knob.
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
        """Index of the point that is valid at a value of the knob.

        Raises:
            SettingError: The value is NaN.
        """
        if np.isnan(knob):
            raise SettingError(f"curve: expected a value of the knob, got {knob}. Give a number.")
        return int(np.searchsorted(self.knob, knob, side="right")) - 1

    def spread(self, most: int) -> NDArray[np.int64]:
        """Choose points that are about evenly spaced in MACs, for a plot.

        Args:
            most: Largest number of points, at least 2.

        Returns:
            Indices of the points, ascending, with the first and the last point.

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
        """The curve as plain values for JSON. The first value of the knob, -inf, becomes None."""
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
    """Compute the curve of an allocator from the step functions of its groups.

    The costs of all points are computed in one call of ``graph.sweep``.
    """
    knob = np.unique(np.concatenate([function.knob for function in steps.values()] or [np.empty(0)]))
    sizes = np.array([len(function.order) for function in steps.values()], dtype=np.int64)
    removed = np.zeros((len(knob) + 1, len(steps)), dtype=np.int64)
    for column, function in enumerate(steps.values()):
        allowed = [limits.removable(len(function.order), int(count)) for count in function.count]
        removed[1:, column] = np.array([0, *allowed])[np.searchsorted(function.knob, knob, side="right")]
    # Limits lower counts, so some values of the knob change nothing. Keep only those that do.
    changes = np.append(True, (removed[1:] != removed[:-1]).any(axis=1))
    knob, removed = np.append(-np.inf, knob)[changes], removed[changes]
    gone: dict[str, NDArray[np.int64]] = {}
    for column, (name, function) in enumerate(steps.items()):
        gone[name] = np.empty(len(function.order), dtype=np.int64)
        # Unit number j in the removal order is gone from the first point at which more than j units are
        # removed.
        places = np.arange(len(function.order))
        gone[name][function.order] = np.searchsorted(removed[:, column], places, side="right")
    params, macs = graph.sweep(gone, len(knob))
    return Curve(allocator, tuple(steps), sizes, knob, params, macs, sizes - removed, knob_name)
