"""Whether an expert does something else for its own tokens than for others: the U-Score for experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import SettingError
from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally, Need
from secateur.signals.units.wasserstein import directions, largest_distance
from secateur.targets.experts.blocks import Block
from secateur.targets.experts.routing import Call, Routed


@dataclass(frozen=True)
class Specialisation(ExpertSignal):
    r"""Sliced Wasserstein-1 distance between what an expert gets from its router and what another gets there.

    The U-Score of FAIR-Pruner (arXiv 2508.02291) asks whether a unit tells classes apart. Tokens have no
    classes, but a router sorts them: for expert e the two classes are the tokens that it was sent, and the
    tokens that were sent elsewhere. What is compared is the block's routed output for a token,
    :math:`y(t) = \sum_j g_j(t) f_j(x_t)`, in the two classes:

    .. math:: U_e = SW_1\big(\{y(t) : e \in \text{top-k}(t)\}, \{y(t) : e \notin \text{top-k}(t)\}\big)

    the mean over `projections` random directions of the distance in one dimension. An expert is worth little
    if the tokens that it helps to compute come out like all others: then nothing is told apart by it. (The
    other natural choice, the expert's own contribution in the two classes, is 0 in the second and so gives
    REAP once more.) It is 0 for an expert that was sent no token, or every one.

    Of each class the first `per_class` tokens are used, so memory does not grow with the data. A distance
    between samples grows as they get fewer: give enough data for every expert to see some dozens of tokens.

    Direction: higher is worth more.

    Attributes:
        projections: Number of directions.
        per_class: Most tokens of a class that are used.
    """

    projections: int = 16
    per_class: int = 128

    name: ClassVar[str] = "specialisation"
    needs: ClassVar[frozenset[Need]] = frozenset({"routing"})

    def __post_init__(self) -> None:
        """Check the settings."""
        for setting in ("projections", "per_class"):
            if getattr(self, setting) < 1:
                raise SettingError(
                    f"specialisation: expected {setting} of at least 1, got {getattr(self, setting)}. "
                    "Give a positive number."
                )

    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""
        return _SpecialisationTally(self, context)


class _SpecialisationTally(ExpertTally):
    def __init__(self, signal: Specialisation, context: Context) -> None:
        self._signal, self._seed = signal, context.seed
        self._blocks = context.graph.blocks
        self._directions: dict[int, Tensor] = {}
        # For each expert the projections of tokens that it got (True) and that it did not get (False).
        self._kept: dict[tuple[str, int, bool], list[Tensor]] = {}

    def routed(self, call: Call, routed: Routed, tokens: Tensor) -> None:
        weight = torch.where(routed.valid, routed.weight, 0)
        output = (weight[..., None].double() * routed.output.double()).sum(1)
        if output.shape[1] not in self._directions:
            drawn = directions(output.shape[1], self._signal.projections, self._seed)
            self._directions[output.shape[1]] = drawn.to(output.device)
        projected = output @ self._directions[output.shape[1]]
        for expert in range(call.block.count):
            own = ((routed.index == expert) & routed.valid).any(1)
            for got in (True, False):
                kept = self._kept.setdefault((call.block.name, expert, got), [])
                room = self._signal.per_class - sum(map(len, kept))
                if room > 0:
                    kept.append(projected[own == got][:room])

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        return {
            block.name: np.array([self._distance(block, expert) for expert in range(block.count)])
            for block in self._blocks
        }

    def _distance(self, block: Block, expert: int) -> float:
        parts = [self._kept.get((block.name, expert, got), []) for got in (True, False)]
        sizes = [sum(map(len, part)) for part in parts]
        if not all(sizes):
            return 0.0
        samples = [tokens[:, None] for part in parts for tokens in part]  # [tokens, 1, projections]
        return float(largest_distance(samples, np.repeat([0, 1], sizes))[0])
