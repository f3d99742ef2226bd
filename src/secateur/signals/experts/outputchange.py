"""How much a block's output changes when an expert is removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally, Need
from secateur.targets.experts.routing import Call, Routed, excluding


@dataclass(frozen=True)
class OutputChange(ExpertSignal):
    r"""The mean over all T tokens of how far the block's output moves when the expert alone is removed.

    .. math:: \frac{1}{T} \sum_t \lVert y(t) - y_{-e}(t) \rVert_2

    In y_{-e} the router chooses anew, without the expert: the token's next best one takes its place, and the
    weights are normalised as the router does. So an expert whose place another fills well is worth little,
    however often it is used, which neither `frequency` nor `reap` can see. Costs as many runs of the
    block as a token uses experts, because only the tokens of each expert are run again.

    Direction: higher is worth more.
    """

    name: ClassVar[str] = "output_change"
    needs: ClassVar[frozenset[Need]] = frozenset({"routing"})

    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""
        return _OutputChangeTally(context)


class _OutputChangeTally(ExpertTally):
    def __init__(self, context: Context) -> None:
        self._model, self._sums = context.model, context.zeros()
        self._tokens = dict.fromkeys(self._sums, 0)

    def routed(self, call: Call, routed: Routed, tokens: Tensor) -> None:
        block = call.block
        before = call.result(call.output)[tokens].double()
        for expert in range(block.count):
            own = torch.where((routed.index == expert) & routed.valid)[0].unique()
            if len(own):
                with excluding(self._model, block, [expert]):
                    after = call.again(tokens[own]).double()
                self._sums[block.name][expert] += (before[own] - after).norm(dim=-1).sum()
        self._tokens[block.name] += len(tokens)

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        return {n: (s / max(self._tokens[n], 1)).cpu().numpy() for n, s in self._sums.items()}
