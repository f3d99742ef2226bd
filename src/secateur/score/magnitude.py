"""How large a unit's weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from secateur.errors import ScoreError, SettingError
from secateur.graph.groups import Group, Role, Slice
from secateur.score.signal import Context, Need, Signal, Tally, Vector
from secateur.score.units import covered, sum_by_unit


@dataclass(frozen=True)
class Magnitude(Signal):
    r"""Mean relative norm of the weights that produce and consume a unit.

    .. math:: M_j = \frac{1}{|T_j|} \sum_{t \in T_j} \frac{\lVert w_{t,j} \rVert_p}
              {\frac{1}{|U_t|} \sum_{i \in U_t} \lVert w_{t,i} \rVert_p}

    over the tensors T_j that hold unit j, U_t being the units that tensor t holds. Dividing by the mean lets
    tensors of different scale count alike; a tensor of zeros contributes zeros.

    Biases and buffers do not count: a bias says how far a unit is shifted, not how much of it there is. Only
    in a group that has nothing else do its biases stand in.

    Source: Li et al. 2017, arXiv 1608.08710 (norm of the producing filter). Departure: consuming weights
    count too, since a unit that nobody reads is worth nothing; ``roles=("produce",)`` gives the original,
    up to the scale of the group.

    Direction: large means worth more. Needs no data.

    Attributes:
        p: 1 for the sum of absolute values, 2 for the Euclidean norm.
        roles: Which of the unit's tensors count.
    """

    p: Literal[1, 2] = 2
    roles: tuple[Role, ...] = ("produce", "consume")

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.p not in (1, 2):
            raise SettingError(f"magnitude: expected p of 1 or 2, got {self.p}. Do choose one of them.")
        unknown = set(self.roles) - {"produce", "consume", "scale"}
        if unknown or not self.roles:
            raise SettingError(
                f"magnitude: expected roles among produce, consume and scale, got {self.roles}. Do name one."
            )

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _MagnitudeTally(self, context)


class _MagnitudeTally(Tally):
    def __init__(self, signal: Magnitude, context: Context) -> None:
        self._signal = signal
        self._context = context

    def finish(self) -> Mapping[str, Vector]:
        return {group.name: self._score(group) for group in self._context.graph.groups}

    def _score(self, group: Group) -> Vector:
        pieces = [
            s
            for s in group.slices
            if s.role in self._signal.roles
            and s.tensor in self._context.parameters
            and self._context.tensors[s.tensor].is_floating_point()
        ]
        weights = [s for s in pieces if self._context.tensors[s.tensor].ndim > 1] or pieces
        if not weights:
            raise ScoreError(
                f"magnitude, group {group.name}: expected parameters with roles "
                f"{', '.join(self._signal.roles)}, got none. Do name other roles, or exclude the group."
            )
        total = np.zeros(group.size)
        tensors = np.zeros(group.size)
        for piece in weights:
            held = covered(piece, group.size)
            norms = self._norms(self._context.tensors[piece.tensor], piece, group.size)
            mean = norms[held].mean()
            total += norms / mean if mean > 0 else 0.0
            tensors += held
        return total / np.maximum(tensors, 1)

    def _norms(self, tensor: Tensor, piece: Slice, size: int) -> Vector:
        tensor = tensor.detach().double()
        if self._signal.p == 1:
            return sum_by_unit(tensor.abs(), piece, size)
        return np.sqrt(sum_by_unit(tensor.square(), piece, size))
