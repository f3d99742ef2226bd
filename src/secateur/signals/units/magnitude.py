"""How large a unit's weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from secateur.errors import SettingError
from secateur.graph.groups import Group, Role, Slice
from secateur.signals.by_unit import sum_by_unit
from secateur.signals.combine import Combine, Combined, combined
from secateur.signals.signal import Context, Need, Tally, Vector
from secateur.signals.slices import multipliers, relative, weight_slices


@dataclass(frozen=True)
class Magnitude(Combined):
    r"""Mean relative norm of the weights that produce, scale and consume a unit.

    .. math:: M_j = \frac{1}{|T_j|} \sum_{t \in T_j} \frac{\lVert w_{t,j} \rVert_p}
              {\frac{1}{|U_t|} \sum_{i \in U_t} \lVert w_{t,i} \rVert_p}

    over the tensors T_j that hold unit j, U_t being the units that tensor t holds. Dividing by the mean lets
    tensors of different scale count alike; a tensor of zeros contributes zeros. What scales a unit is the
    weight of its normalisation, or a layer scale.

    Biases and buffers do not count: a bias says how far a unit is shifted, not how much of it there is. Only
    in a group that has nothing else do its biases stand in.

    Source: Li et al. 2017, arXiv 1608.08710 (norm of the producing filter). Departure: scaling and consuming
    weights count too, since a unit that is scaled to nothing, or that nobody reads, is worth nothing;
    ``roles=("produce",)`` gives the original, up to the scale of the group.

    Direction: large means worth more. Needs no data.

    Attributes:
        p: 1 for the sum of absolute values, 2 for the Euclidean norm.
        roles: Which of the unit's tensors count.
        combine: How the tensors' relative norms become one score; see `secateur.signals.combine`.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> sc.score(graph, None, sc.signals.Magnitude(roles=("produce",)))["magnitude"]["0"]
        array([0.5, 1. , 1.5])
    """

    p: Literal[1, 2] = 2
    roles: tuple[Role, ...] = ("produce", "scale", "consume")
    combine: Combine = "mean"

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.p not in (1, 2):
            raise SettingError(f"{self.name}: expected p of 1 or 2, got {self.p}. Choose one of them.")
        unknown = set(self.roles) - {"produce", "consume", "scale"}
        if unknown or not self.roles:
            raise SettingError(
                f"{self.name}: expected roles among produce, scale and consume, got {self.roles}. Name one."
            )
        super().__post_init__()

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _MagnitudeTally(self, context)


@dataclass(frozen=True)
class L1(Magnitude):
    """`Magnitude` with sums of absolute values.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> sc.score(graph, None, sc.signals.L1())["l1"]["0"]
        array([0.625, 1.25 , 1.125])
    """

    p: Literal[1, 2] = field(default=1, init=False)

    name: ClassVar[str] = "l1"


@dataclass(frozen=True)
class L2(Magnitude):
    """`Magnitude` with Euclidean norms.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> sc.score(graph, None, sc.signals.L2())["l2"]["0"]
        array([0.68933983, 1.12132034, 1.18933983])
    """

    p: Literal[1, 2] = field(default=2, init=False)

    name: ClassVar[str] = "l2"


class _MagnitudeTally(Tally):
    def __init__(self, signal: Magnitude, context: Context) -> None:
        self._signal = signal
        self._context = context

    def finish(self) -> Mapping[str, Vector]:
        scales = multipliers(self._context.graph) if "scale" in self._signal.roles else frozenset[str]()
        return {group.name: self._score(group, scales) for group in self._context.graph.groups}

    def _score(self, group: Group, scales: frozenset[str]) -> Vector:
        pieces = weight_slices(self._signal.name, self._context, group, self._signal.roles, scales)
        units = [np.unique(piece.unit) for piece in pieces]
        norms = [
            relative(self._norms(self._context.tensors[piece.tensor], piece, group.size)[unit])
            for piece, unit in zip(pieces, units, strict=True)
        ]
        return combined(norms, units, group.size, self._signal.combine)

    def _norms(self, tensor: Tensor, piece: Slice, size: int) -> Vector:
        tensor = tensor.detach().double()
        if self._signal.p == 1:
            return sum_by_unit(tensor.abs(), piece, size)
        return np.sqrt(sum_by_unit(tensor.square(), piece, size))
