"""N:M sparsity: n of every m consecutive weights stay."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.limits import Limits
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction, step_function
from secateur.errors import SettingError
from secateur.graph.groups import WeightGroup
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


@dataclass(frozen=True)
class Pattern(Allocator):
    """N:M sparsity: in each block of m consecutive weights, the n with the highest scores stay. Default: 2:4.

    Blocks are cut along the rows of ``weight.reshape(outputs, -1)``. For a linear layer that is along its
    inputs. A tensor whose rows are not a multiple of m long is not pruned. Weights are not permuted. Of equal
    scores, the weight with the lower index stays. Source of the pattern: Mishra et al. 2021, Accelerating
    Sparse Deep Neural Networks, arXiv 2104.08378.

    Attributes:
        n: Number of weights that stay in each block, at least 1.
        m: Number of weights in a block, more than n.
        removal: Signal that scores the weights: a name or an instance.

    Raises:
        SettingError: n and m are not integers with 1 <= n < m. On `allocate`: a budget was given, or the
            graph holds units instead of single weights.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> weights = sc.trace(net, granularity="weight")
        >>> plan = sc.Pattern(2, 4).allocate(weights, sc.score(weights))
        >>> sc.apply(net, plan)[0].weight.count_nonzero(dim=1).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]
    """

    n: int = 2
    m: int = 4
    removal: SignalLike = "magnitude"
    name: ClassVar[str] = "pattern"

    def __post_init__(self) -> None:
        """Checks the values."""
        try:
            n, m = operator.index(self.n), operator.index(self.m)
        except TypeError:
            n, m = 0, 0
        if not 1 <= n < m:
            raise SettingError(
                f"Pattern: expected integers 1 <= n < m, got {self.n!r} and {self.m!r}. Write Pattern(2, 4)."
            )

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """Always 0: the pattern has no knob, so it accepts no budget."""
        if budget is not None:
            raise SettingError(f"Pattern: expected no budget, got {budget}. The pattern says how much goes.")
        return 0.0

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The pattern and the signal."""
        return {"n": self.n, "m": self.m, "removal": name_of(self.removal)}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """One step for each group: at knob 0, all weights outside the pattern are removed."""
        found = {}
        for group in limits.considered(graph.groups):
            if not isinstance(group, WeightGroup):
                raise SettingError(
                    f"Pattern: expected single weights, got the units of {group.name!r}. "
                    "Use granularity 'weight'."
                )
            if group.rows[1] % self.m == 0:
                found[group.name] = step_function(self._removal_points(vector(scores, self.removal, group)))
        return found

    def _removal_points(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Knob value at which each weight is removed: 0, or infinity if it stays. [group.size]"""
        blocks = scores.reshape(-1, self.m)
        # Sorting the reversed rows puts the higher index first among equal scores, as `ascending` does.
        order = self.m - 1 - np.argsort(blocks[:, ::-1], axis=1, kind="stable")
        points = np.full(blocks.shape, np.inf)
        np.put_along_axis(points, order[:, : self.m - self.n], 0.0, axis=1)
        return points.reshape(-1)
