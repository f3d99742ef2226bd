"""How much weight the router gives an expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally, Mean, Need


@dataclass(frozen=True)
class RouterWeight(ExpertSignal):
    r"""The mean over all T tokens of the factor on the expert's output, 0 where it was not chosen.

    .. math:: \frac{1}{T} \sum_t |g_e(t)|

    The factor is the one that the block applies, after whatever normalisation the router has.

    Direction: higher is worth more.
    """

    name: ClassVar[str] = "router_weight"
    needs: ClassVar[frozenset[Need]] = frozenset({"routing"})

    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""
        return Mean(context, lambda routed: routed.weight.abs(), over_all=True)
