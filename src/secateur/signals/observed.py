"""For signals that average one number a sample over activations: where to observe, and the sums."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor

from secateur.errors import ScoreError
from secateur.graph.groups import Group, Site, Stage
from secateur.signals.combine import Combine, Combined, combined
from secateur.signals.signal import Context, Need, Signal, Step, SumTally, Vector

STAGES: tuple[Stage, ...] = ("produced", "normalised", "activated")
"""How far behind the producing layer a value can be observed, in order."""


def sites_at(group: Group, stage: Stage) -> tuple[Site, ...]:
    """Every site of this stage, chosen for each producing layer on its own.

    A layer without that stage is observed at the nearest earlier one; failing that, at its first.
    """
    wanted = STAGES.index(stage)
    chosen: dict[str, Stage] = {}
    for producer in {site.producer for site in group.sites}:
        stages = sorted({STAGES.index(s.stage) for s in group.sites if s.producer == producer})
        earlier = [s for s in stages if s <= wanted]
        chosen[producer] = STAGES[earlier[-1] if earlier else stages[0]]
    return tuple(site for site in group.sites if site.stage == chosen[site.producer])


def check_observable(signal: Signal, group: Group) -> tuple[Site, ...]:
    """The signal's sites of the group.

    Raises:
        ScoreError: They do not show every unit.
    """
    sites = signal.sites(group)
    missing = group.size - len({int(unit) for site in sites for unit in site.unit})
    if missing:
        raise ScoreError(
            f"{signal.name}, group {group.name}: expected every unit to be observable, got "
            f"{missing} of {group.size} that are not. Choose a signal that reads no activations."
        )
    return sites


def without_padding(value: Tensor, step: Step) -> list[Tensor]:
    """Cut a value [samples, entries, map] to the positions that are no padding.

    Returns:
        The value itself if it has no padding; else a value [1, entries, its own map] for each sample. A
        sample that is all padding stays as it is.
    """
    real = step.padding.real(len(value), *step.map, value.device) if len(step.map) == 1 else None
    if real is None:
        return [value]
    return [one[None][..., rows | ~rows.any()] for one, rows in zip(value, real, strict=True)]


class EntrySignal(Combined):
    """A signal from what units show behind the activation function, where there is one."""

    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})

    def sites(self, group: Group) -> tuple[Site, ...]:
        """Behind the activation function, where there is one."""
        return sites_at(group, "activated")


class EntryTally(SumTally):
    """Sums one number for each sample and entry; the mean is over samples, then over members.

    A subclass computes the number in `measure`. Memory: 8 bytes for each entry.
    """

    def __init__(self, signal: Signal, context: Context, combine: Combine) -> None:
        super().__init__(context)
        self._combine: Combine = combine
        self._sites = {group.name: check_observable(signal, group) for group in context.graph.groups}
        self._key: dict[Site, str] = {
            site: f"{name} {index}" for name, sites in self._sites.items() for index, site in enumerate(sites)
        }
        self.sums = {key: np.zeros(len(site.unit)) for site, key in self._key.items()}

    @abstractmethod
    def measure(self, value: Tensor, site: Site) -> Tensor:
        """From values [samples, entries, map] to one number each. [samples, entries]"""

    def observe(self, group: Group, site: Site, value: Tensor, step: Step) -> None:
        """Add the batch's numbers up, in float64, without padding."""
        for part in without_padding(value, step):
            self.sums[self._key[site]] += self.measure(part, site).double().sum(0).cpu().numpy()

    def finish(self) -> Mapping[str, Vector]:
        """The mean over samples of each entry, combined."""
        return {
            group.name: combined(
                [self.sums[self._key[site]] / self.samples for site in self._sites[group.name]],
                [site.unit for site in self._sites[group.name]],
                group.size,
                self._combine,
            )
            for group in self.context.graph.groups
        }
