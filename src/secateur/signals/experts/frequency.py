"""How often an expert is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally, Mean, Need


@dataclass(frozen=True)
class Frequency(ExpertSignal):
    r"""The share of tokens whose router chose the expert: :math:`n_e / T`, in [0, 1].

    Direction: an expert that is never chosen is worth 0.
    """

    name: ClassVar[str] = "frequency"
    needs: ClassVar[frozenset[Need]] = frozenset({"routing"})

    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""
        return Mean(context, lambda routed: torch.ones_like(routed.weight), over_all=True)
