"""The derivative of each sample's loss with respect to a factor on each unit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from secateur.graph.groups import Group, Site
from secateur.signals.observed import check_observable, sites_at
from secateur.signals.signal import Context, Need, Signal, Step, SumTally, Tally, Vector


class GateSignal(Signal):
    """A signal that averages a function of each sample's derivative with respect to a factor on the unit."""

    needs: ClassVar[frozenset[Need]] = frozenset({"activation_gradients"})

    @abstractmethod
    def weigh(self, derivatives: Tensor) -> Tensor:
        """What to average over samples, from derivatives of the same shape, float64 [samples, group.size]."""

    def sites(self, group: Group) -> tuple[Site, ...]:
        """Behind the activation function, where there is one."""
        return sites_at(group, "activated")

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return GateTally(self, context)


class GateTally(SumTally):
    r"""Sums a function of each sample's derivative with respect to a factor on the unit.

    .. math:: d_{s,j} = \sum_{t \in S_j} \sum_m a_{s,t,m} \, \frac{\partial L_s}{\partial a_{s,t,m}}

    is the derivative of sample s's loss with respect to a factor of 1 on everything the unit shows: its
    members S_j, and the numbers m of their maps. So -d is, to first order, what removing the unit adds to the
    loss.
    """

    def __init__(self, signal: GateSignal, context: Context) -> None:
        super().__init__(context)
        self._signal = signal
        self._open: dict[str, Tensor] = {}  # the batch's derivatives so far: [samples, group.size]
        self._waiting: dict[str, int] = {}  # how many sites of the group the batch has not shown yet
        self._sites = {group.name: len(check_observable(signal, group)) for group in context.graph.groups}

    def activation_gradients(
        self, group: Group, site: Site, value: Tensor, gradient: Tensor, step: Step
    ) -> None:
        """Add what one member contributes; after the last member, call the signal's `weigh` on the sum."""
        name = group.name
        if name not in self._open:
            self._open[name] = value.new_zeros((step.size, group.size), dtype=torch.float64)
            self._waiting[name] = self._sites[name]
        if value.dtype not in (torch.float32, torch.float64):
            value, gradient = value.float(), gradient.float()
        share = step.size * (value * gradient).sum(2, dtype=torch.float64)
        self._open[name].index_add_(1, torch.as_tensor(site.unit, device=value.device), share)
        self._waiting[name] -= 1
        if not self._waiting[name]:
            self.sums[name] += self._signal.weigh(self._open.pop(name)).sum(0).cpu().numpy()

    def finish(self) -> Mapping[str, Vector]:
        """The mean over samples."""
        return {name: total / self.samples for name, total in self.sums.items()}
