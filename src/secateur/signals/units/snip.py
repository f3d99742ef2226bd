"""How much the loss depends on a unit's single weights: connection sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.signals.by_unit import producers, sum_by_unit
from secateur.signals.signal import Context, Need, Signal, Step, Tally, Vector, require_shape


@dataclass(frozen=True)
class Snip(Signal):
    r"""Sum of the absolute first-order changes of the loss as each producing weight goes to zero.

    .. math:: S_j = \sum_{w \in W_j} \Bigl| w \, \frac{\partial L}{\partial w} \Bigr|

    where W_j are the weights and biases that produce unit j, and L is the mean loss over all calibration
    samples.

    Source: Lee et al. 2019, SNIP, arXiv 1810.02340. Departures: summed over a unit's weights, since units are
    removed, not weights; the gradient is that of all the data, where the paper takes one batch; and no
    division by the sum over the network, which changes no rank. Unlike in `Taylor`, changes of opposite sign
    do not cancel.

    Direction: large means that the task is sensitive to the unit, so it is to be protected. Keeps one
    gradient of each producing tensor, in float64.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> data = [(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))]
        >>> sc.score(graph, data, sc.signals.Snip(), progress=False)["snip"]["0"].round(3)
        array([0.631, 0.   , 1.892])
    """

    name: ClassVar[str] = "snip"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "gradients"})

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _SnipTally(context)


class _SnipTally(Tally):
    def __init__(self, context: Context) -> None:
        self._context = context
        self._samples = 0
        self._sums: dict[str, Tensor] = {}  # gradients of all samples, by tensor

    def gradients(self, gradients: Mapping[str, Tensor], step: Step) -> None:
        self._samples += step.size
        for name, gradient in gradients.items():
            share = step.size * gradient.double()
            if name in self._sums:
                self._sums[name] += share
            else:
                self._sums[name] = share

    def state(self) -> dict[str, Tensor]:
        sums = {f"gradient {name}": total.cpu() for name, total in self._sums.items()}
        return {"samples": torch.tensor(self._samples), **sums}

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        self._samples = sum(int(state["samples"]) for state in states)
        self._sums = {}
        for state in states:  # a process without a share of the data has no gradients
            for key, total in state.items():
                if key != "samples":
                    name = key.removeprefix("gradient ")
                    tensor = self._context.tensors[name]
                    total = require_shape(name, total, torch.float64, *tensor.shape).to(tensor.device)
                    self._sums[name] = self._sums[name] + total if name in self._sums else total.clone()

    def finish(self) -> Mapping[str, Vector]:
        scores: dict[str, Vector] = {group.name: np.zeros(group.size) for group in self._context.graph.groups}
        for name, pieces in producers(self._context.graph).items():
            if name in self._sums:
                weight = self._context.tensors[name].detach().double()
                product = (weight * self._sums[name] / self._samples).abs()
                for group, piece in pieces:
                    scores[group.name] += sum_by_unit(product, piece, group.size)
        return scores
