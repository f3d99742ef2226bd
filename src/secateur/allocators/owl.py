"""Outlier-weighted layerwise sparsity (OWL): layers with many outliers keep more weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.checks import fraction
from secateur.allocators.density import by_density
from secateur.allocators.limits import Limits
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction
from secateur.errors import SettingError
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


def outliers(scores: NDArray[np.float64], above: float) -> float:
    """The share of the scores that are larger than `above` times their mean, in [0, 1]."""
    return float((scores > above * scores.mean()).mean())


@dataclass(frozen=True)
class OWL(Allocator):
    r"""Sets a density, the kept fraction, for each layer: higher if it has many outlier scores.

    .. math:: d_l = \min\Bigl(1, t + 2\lambda \frac{D_l - \min D}{\max D - \min D} - \lambda\Bigr)

    D_l is the share of layer l's scores that are above M times their mean. All densities lie in a band of
    width 2λ around t, and t is solved for the budget. In each layer the lowest scores are removed.

    Source: Yin et al. 2024, Outlier Weighed Layerwise Sparsity, arXiv 2310.05175. Departures: here a layer is
        one
    group, in the paper it is a whole transformer block; here the band is placed so that the budget is met,
    which weights each layer by its size, while the paper uses the plain mean over layers.

    Attributes:
        above: M, above 0.
        width: λ, half the width of the band, in [0, 1).
        removal: Signal whose lowest scores are removed first. The paper uses ``wanda`` for single weights.

    Raises:
        SettingError: A setting is out of range; on `allocate`, there is no budget.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> weights = sc.trace(net, granularity="weight")
        >>> data = [torch.randn(20, 4) for _ in range(5)]
        >>> scores = sc.score(weights, data, ["wanda", "magnitude"], progress=False)
        >>> plan = sc.OWL().allocate(weights, scores, sc.Budget(sparsity=0.5))
        >>> round(plan.sparsity, 2)
        0.5
    """

    above: float = 5.0
    width: float = 0.08
    removal: SignalLike = "magnitude"
    name: ClassVar[str] = "owl"
    solved: ClassVar[str] = "density"
    knob_name: ClassVar[str] = "−density"

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "width", fraction("OWL", "width", self.width))
        if isinstance(self.above, bool) or not isinstance(self.above, Real) or not 0 < self.above < math.inf:
            raise SettingError(
                f"OWL: expected above to be a number over 0, got {self.above!r}. Write above=5."
            )

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """None: only a budget can decide."""
        if budget is None:
            raise SettingError("OWL: expected a budget, got none. Write Budget(sparsity=0.5), for example.")
        return None

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The centre t of the band, and the allocator's own settings."""
        return {
            "density": None if knob is None else -float(knob),
            "above": float(self.above),
            "width": self.width,
            "removal": name_of(self.removal),
        }

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The knob is −t. Unit i of N in the removal order goes when the density falls to 1 − (i + 1) / N."""
        values = {g.name: vector(scores, self.removal, g) for g in limits.considered(graph.groups)}
        shares = {name: outliers(found, self.above) for name, found in values.items()}
        low, high = min(shares.values()), max(shares.values())
        span = high - low or 1.0

        def knob(name: str, density: NDArray[np.float64]) -> NDArray[np.float64]:
            offset = 2 * self.width * (shares[name] - low) / span - self.width
            return offset - density

        return by_density(values, knob)
