"""Erdős–Rényi–kernel (ERK) densities: smaller layers keep a larger fraction of their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
from secateur.graph.groups import Group, WeightGroup
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


def factor(group: Group) -> float:
    """The sum of the axis lengths of a weight tensor over their product. The layer's density is ε times this.

    Raises:
        SettingError: The group is no weight tensor.
    """
    if not isinstance(group, WeightGroup):
        raise SettingError(
            f"ERK: expected weight tensors, whose shapes say their densities, got the units of "
            f"{group.name!r}. Use granularity 'weight', or another rule."
        )
    return sum(group.shape) / math.prod(group.shape)


@dataclass(frozen=True)
class ERK(Allocator):
    r"""Sets a density, the kept fraction, for each weight tensor from its shape. Only for single weights.

    .. math:: d_l = \min\Bigl(c, \varepsilon \frac{n_{in} + n_{out} + k_h + k_w}{n_{in} n_{out} k_h k_w}\Bigr)

    ε is solved for the budget. So if the cap c limits one layer, the other layers keep more, in the same
    proportions. In each layer the weights with the lowest scores are removed.

    Source: Mocanu et al. 2018, arXiv 1707.04780, for linear layers, and Evci et al. 2020, RigL, arXiv
    1911.11134, for kernels; both with c = 1. If c is below 1, no layer stays dense: small layers, such as 1×1
    shortcuts, lose weights too.

    Attributes:
        cap: c, the highest density, in (0, 1].
        removal: Signal whose lowest scores go first: a name or an instance.

    Raises:
        SettingError: A setting is out of range; on `allocate`, there is no budget or there are no weights.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> weights = sc.trace(net, granularity="weight")
        >>> scores = sc.score(weights)
        >>> plan = sc.ERK(cap=0.9).allocate(weights, scores, sc.Budget(sparsity=0.5))
        >>> round(plan.sparsity, 2)
        0.5
    """

    cap: float = 1.0
    removal: SignalLike = "magnitude"
    name: ClassVar[str] = "erk"
    solved: ClassVar[str] = "epsilon"
    knob_name: ClassVar[str] = "−ε"

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "cap", fraction("ERK", "cap", self.cap, one=True))
        if self.cap == 0:
            raise SettingError("ERK: expected cap in (0, 1], got 0. Write cap=1.0.")

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """None: only a budget can decide."""
        if budget is None:
            raise SettingError("ERK: expected a budget, got none. Write Budget(sparsity=0.9), for example.")
        return None

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The factor ε that was used, the cap and the signal."""
        epsilon = None if knob is None or np.isneginf(knob) else -float(knob)
        return {"epsilon": epsilon, "cap": self.cap, "removal": name_of(self.removal)}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The knob is −ε. At a very small knob (a very large ε) all densities equal the cap."""
        groups = {g.name: g for g in limits.considered(graph.groups)}
        largest = max(1 / factor(group) for group in groups.values())

        def knob(name: str, density: NDArray[np.float64]) -> NDArray[np.float64]:
            # Weights above the cap are removed at the first step, whatever ε is.
            return np.where(density >= self.cap, -largest, -density / factor(groups[name]))

        return by_density({name: vector(scores, self.removal, g) for name, g in groups.items()}, knob)
