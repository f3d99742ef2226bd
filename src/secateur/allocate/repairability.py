"""Relative repairability: sparsity goes to layers whose damage can be repaired.

Source: Relative Repairability, arXiv 2605.25508, known here from its abstract, which defines the diagnostic.
How it becomes densities is our own choice; see `Repairability`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocate.base import Allocator
from secateur.allocate.budget import Budget
from secateur.allocate.decision import Decision
from secateur.allocate.limits import Limits, shorten
from secateur.allocate.ranking import ascending
from secateur.allocate.signals import ScoreTable, vector
from secateur.allocate.staircase import Staircase
from secateur.errors import SettingError
from secateur.score.combination import Asked, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


@dataclass(frozen=True, eq=False)
class Distortion:
    """What pruning one layer alone does to its outputs, before and after repair.

    Distortion is the squared error of the outputs over the sum of their squares.

    Attributes:
        sparsity: Ascending, from 0 to 1. [points]
        raw: D_raw, the distortion. [points]
        repaired: D_rep, what is left of it after each output's mean and variance are matched. [points]
    """

    sparsity: NDArray[np.float64]
    raw: NDArray[np.float64]
    repaired: NDArray[np.float64]

    @property
    def ratio(self) -> NDArray[np.float64]:
        """RR = D_rep / D_raw: the fraction of the damage that repair leaves; 0 where none is. [points]"""
        found: NDArray[np.float64] = self.repaired / np.where(self.raw > 0, self.raw, np.inf)
        return found

    def residual(self, sparsity: float) -> float:
        """D_rep at a sparsity, linear between the points."""
        return float(np.interp(sparsity, self.sparsity, self.repaired))

    def price(self, sparsity: NDArray[np.float64]) -> NDArray[np.float64]:
        """How fast the layer is lost as sparsity rises: the slope of D_rep(s) / D_rep(1); never falling.

        D_rep(1), the distortion of constant outputs, is the outputs' variance. Slopes are those of the lower
        convex hull, each at the middle of its piece, linear in between; 0 at sparsity 0, and beyond the last
        middle rising on as before it.
        """
        x, y = _hull(self.sparsity, np.maximum.accumulate(self.repaired) / (self.repaired[-1] or 1.0))
        slope, middle = np.diff(y) / np.diff(x), (x[1:] + x[:-1]) / 2
        slope, middle = np.append(0.0, slope), np.append(0.0, middle)
        steepness = (slope[-1] - slope[-2]) / (middle[-1] - middle[-2])
        end = slope[-1] + steepness * (1 - middle[-1])
        found: NDArray[np.float64] = np.interp(sparsity, np.append(middle, 1.0), np.append(slope, end))
        return found


def _hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The corners of the lower convex hull."""
    kept: list[int] = []
    for k in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2:]
            if (y[b] - y[a]) * (x[k] - x[a]) < (y[k] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(k)
    return x[kept], y[kept]


@dataclass(frozen=True)
class Repairability(Allocator):
    r"""Every layer is pruned up to the sparsity at which one more weight loses the same share of the layer.

    .. math:: \min_s \sum_l \frac{D_{rep,l}(s_l)}{D_{rep,l}(1)}
              \quad\text{for given}\quad \sum_l N_l s_l

    The residual that repair leaves is the price of sparsity. With λ the price of one weight, solved for the
    budget, layer l loses weights while ``D_rep,l'(s) / (D_rep,l(1) · N_l) <= λ``. D_rep = RR · D_raw, so of
    two layers with the same raw damage the one with the higher RR, whose damage repair leaves, is kept
    denser. D_rep(1) is the variance of the layer's outputs: the share counts a layer that is lost as lost,
    however large the mean of its outputs. Its curves are measured on one layer at a time; that shares of
    layers add up is the assumption. The lowest scores of each layer go.

    Source: the diagnostic is that of Relative Repairability, arXiv 2605.25508; the mapping is ours. The curve
    is replaced by its lower convex hull, without which layers would jump.

    Attributes:
        curves: Per weight its `Distortion`; None: `secateur.masks.prune` measures them.
        removal: Signal whose lowest scores go first; that of the curves.
        dense: Layers whose name matches one of these shell patterns stay as they are, projections for
            instance: ``("*downsample*",)``.

    Raises:
        SettingError: On `allocate`: there is no budget, a layer has no curve, or a pattern matches nothing.
    """

    curves: Mapping[str, Distortion] | None = None
    removal: Asked = "magnitude"
    dense: tuple[str, ...] = ()
    name: ClassVar[str] = "repairability"

    @property
    def signals(self) -> tuple[Asked, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """None: a budget decides."""
        if budget is None:
            raise SettingError(
                "Repairability: expected a budget, got none. Write Budget(sparsity=0.9), for example."
            )
        return None

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The price λ that decided, the signal, and what stays dense."""
        price = None if knob is None else float(knob)
        return {"price": price, "removal": name_of(self.removal), "dense": list(self.dense)}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, Staircase]:
        """The unit at place i of N goes from λ = price(at sparsity (i + 1) / N) / N on."""
        groups = limits.considered(graph.groups)
        held = _matching(self.dense, [g.name for g in groups])
        found = {}
        for group in groups:
            if group.name in held:
                continue
            count = np.arange(1, group.size, dtype=np.int64)
            price = self._curve(group.name).price(count / group.size) / group.size
            last = np.append(price[1:] > price[:-1], np.ones(min(1, len(price)), dtype=np.bool_))
            order = ascending(vector(scores, self.removal, group))
            found[group.name] = Staircase(order, price[last], count[last])
        return found

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """The predicted residual of each layer that loses weights, pruned alone: D_rep; and their sum."""
        residual = {
            name: self._curve(name).residual(decision.removed[name] / len(stairs.order))
            for name, stairs in decision.steps.items()
            if decision.removed[name]
        }
        return {"residual": dict(residual), "sum": sum(residual.values())}

    def _curve(self, name: str) -> Distortion:
        if self.curves is None or name not in self.curves:
            got = "none" if self.curves is None else f"only {shorten(self.curves)}"
            raise SettingError(
                f"Repairability: expected a curve of {name!r}, got {got}. Measure them with "
                "secateur.masks.distortions."
            )
        return self.curves[name]


def _matching(patterns: Iterable[str], names: list[str]) -> set[str]:
    """The names that a pattern matches."""
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise SettingError(
                f"Repairability: expected each pattern of dense to match a weight, got {pattern!r}, which "
                f"matches none. Choose among {shorten(names)}."
            )
        found |= matching
    return found
