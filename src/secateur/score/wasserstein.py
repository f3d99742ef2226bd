"""How well a unit tells classes apart: the U-Score of FAIR-Pruner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import CalibrationError, ScoreError, SettingError
from secateur.graph.groups import Group, Site, Stage
from secateur.score.signal import Context, Need, Signal, Step, Tally, Vector
from secateur.score.units import max_by_unit

_STAGES: tuple[Stage, ...] = ("produced", "normalised", "activated")

_CHUNK = 2**22
"""Most float64 numbers that comparing classes holds at a time (32 MiB)."""


@dataclass(frozen=True)
class Wasserstein(Signal):
    r"""Largest Wasserstein-1 distance between a unit's activations in two classes.

    For a unit with one number a sample, F_a being that number's distribution over the samples of class a,

    .. math:: U = \max_{a, b} W_1(F_a, F_b), \qquad
              W_1(F_a, F_b) = \int_0^1 \lvert F_a^{-1}(u) - F_b^{-1}(u) \rvert \, du .

    For a unit with a map of M numbers a sample, W_1 is the sliced distance: the mean over `projections`
    random directions θ (normal, scaled to length 1, the same for all maps of M numbers) of W_1 between the
    projected maps. Class sizes may differ; the integral is exact. A unit that several entries carry (gated
    halves, flattened maps), or that is observed in several places, is worth the largest of their distances:
    it is useful if anything it carries tells classes apart.

    Source: FAIR-Pruner, arXiv 2508.02291. Departure: of each class the first `per_class` samples are used, so
    that memory does not grow with the data. What is kept is, in bytes,
    4 · classes · per_class · projections · units.

    Direction: small means that the unit tells no classes apart, so it is a candidate for removal.

    Attributes:
        projections: Number of directions for maps.
        per_class: Most samples of a class that are used.
        stage: Where to observe: the layer's own output (``produced``), after the normalisation that follows
            (``normalised``), or after the activation (``activated``). A layer without that stage is observed
            at the nearest earlier one; failing that, at its first.
    """

    projections: int = 16
    per_class: int = 32
    stage: Stage = "produced"

    name: ClassVar[str] = "wasserstein"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations", "labels"})

    def __post_init__(self) -> None:
        """Check the settings."""
        for setting in ("projections", "per_class"):
            value = getattr(self, setting)
            if value < 1:
                raise SettingError(
                    f"wasserstein: expected {setting} of at least 1, got {value}. Do give a positive number."
                )
        if self.stage not in _STAGES:
            raise SettingError(
                f"wasserstein: expected stage to be one of {', '.join(_STAGES)}, got "
                f"{self.stage!r}. Do name one."
            )

    def sites(self, group: Group) -> tuple[Site, ...]:
        """Every site of the asked-for stage, chosen for each producing layer on its own."""
        wanted = _STAGES.index(self.stage)
        chosen: dict[str, Stage] = {}
        for producer in {site.producer for site in group.sites}:
            stages = sorted({_STAGES.index(s.stage) for s in group.sites if s.producer == producer})
            earlier = [s for s in stages if s <= wanted]
            chosen[producer] = _STAGES[earlier[-1] if earlier else stages[0]]
        return tuple(site for site in group.sites if site.stage == chosen[site.producer])

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _WassersteinTally(self, context)


def directions(size: int, count: int, seed: int) -> Tensor:
    """Random unit vectors. float64 [size, count]; for maps of one number the identity, [1, 1].

    Example:
        >>> bool(torch.allclose(directions(9, 4, seed=0).norm(dim=0), torch.ones(4, dtype=torch.float64)))
        True
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    drawn: Tensor = torch.randn(
        size, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    return torch.nn.functional.normalize(drawn, dim=0)


def largest_distance(samples: Tensor, classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Largest mean-over-projections Wasserstein-1 distance between two classes, for every entry.

    Quantile functions are step functions that jump at multiples of 1/n, n being the class's size. On the
    union of all classes' jumps each is a vector, and W_1 is the L1 distance of two of them, weighted by the
    lengths of the steps. With these multiplied in, the result is the L1 diameter of one point per class.

    Args:
        samples: [samples, entries, projections]
        classes: The class of each sample. [samples]

    Returns:
        [entries]

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1)
        >>> largest_distance(x, np.array([0, 0, 1, 1]))
        array([2.])
    """
    members: dict[int, list[NDArray[np.int64]]] = {}  # class size to the classes of that size
    for label in np.unique(classes):
        index = np.flatnonzero(classes == label)
        members.setdefault(len(index), []).append(index)
    device = samples.device
    jumps = sorted({Fraction(i, n) for n in members for i in range(n)} | {Fraction(1)})
    steps = len(jumps) - 1
    lengths = torch.tensor([float(b - a) for a, b in pairwise(jumps)], dtype=torch.float64)
    # For each class size: which samples, and which of them, once sorted, each step shows.
    gathers = [
        (
            torch.as_tensor(np.stack(index), device=device),
            torch.tensor([a.numerator * n // a.denominator for a in jumps[:-1]], device=device),
        )
        for n, index in members.items()
    ]
    count = sum(len(index) for index in members.values())
    _, entries, projections = samples.shape
    weights = (lengths / projections).to(device)
    chunk = max(1, _CHUNK // (count * (projections * steps + count)))
    result = np.empty(entries)
    for start in range(0, entries, chunk):
        part = samples[:, start : start + chunk]
        points = [
            # [classes, n, entries, projections] -> [entries, classes, projections, n]
            part[which].permute(2, 0, 3, 1).sort(dim=-1).values[..., shown].double() * weights
            for which, shown in gathers
        ]
        joined = torch.cat(points, dim=1).flatten(2)
        result[start : start + chunk] = torch.cdist(joined, joined, p=1.0).amax(dim=(1, 2)).cpu().numpy()
    return result


class _WassersteinTally(Tally):
    def __init__(self, signal: Wasserstein, context: Context) -> None:
        self._signal = signal
        self._context = context
        self._seen: Counter[int] = Counter()  # samples of each class that are kept
        self._classes: list[int] = []  # the class of each kept sample
        self._keep = torch.empty(0, dtype=torch.int64)  # which samples of the batch are kept
        self._directions: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._sites = {group.name: signal.sites(group) for group in context.graph.groups}
        self._kept: dict[Site, list[Tensor]] = {}  # [samples, entries, projections] of each batch
        self._map: dict[Site, int] = {}  # numbers a map has
        for group in context.graph.groups:
            missing = group.size - len({int(u) for site in self._sites[group.name] for u in site.unit})
            if missing:
                raise ScoreError(
                    f"wasserstein, group {group.name}: expected every unit to be observable, got "
                    f"{missing} of {group.size} that are not. Do exclude the group, or use a "
                    "signal that reads no activations."
                )

    def begin(self, step: Step) -> None:
        if step.classes is None:
            raise CalibrationError(
                "wasserstein: expected labels, got none. Do give batches (inputs, labels)."
            )
        keep: list[int] = []
        for position, label in enumerate(step.classes.tolist()):
            if self._seen[label] < self._signal.per_class:
                self._seen[label] += 1
                self._classes.append(label)
                keep.append(position)
        self._keep = torch.tensor(keep, dtype=torch.int64)

    def observe(self, group: Group, site: Site, value: Tensor, step: Step) -> None:
        if len(self._keep) == 0:
            return
        if len(self._keep) < step.size:
            value = value[self._keep.to(value.device)]
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        if self._map.setdefault(site, value.shape[2]) != value.shape[2]:
            raise CalibrationError(
                f"wasserstein, group {group.name}: expected activations of {self._map[site]} numbers a "
                f"unit, as in the first batch, got {value.shape[2]} at {site.node}. Do give "
                "samples of one size, padded if need be."
            )
        projected = value @ self._direction(value)  # a new tensor, also for one number a unit
        if not bool(torch.isfinite(projected).all()):
            raise CalibrationError(
                f"wasserstein, group {group.name}: expected finite activations at {site.node}, got NaN or "
                "infinity. Do check the data, and the model for overflow."
            )
        self._kept.setdefault(site, []).append(projected)

    def _direction(self, value: Tensor) -> Tensor:
        key = (value.shape[2], value.dtype, value.device)
        if key not in self._directions:
            drawn = directions(value.shape[2], self._signal.projections, self._context.seed)
            self._directions[key] = drawn.to(value.device, value.dtype)
        return self._directions[key]

    def finish(self) -> Mapping[str, Vector]:
        if len(self._seen) < 2:
            raise CalibrationError(
                f"wasserstein: expected samples of at least two classes, got only class "
                f"{next(iter(self._seen))}. "
                "Do give calibration data of several classes, or choose a signal that needs no labels."
            )
        classes = np.array(self._classes)
        scores: dict[str, Vector] = {}
        for group in self._context.graph.groups:
            best = np.full(group.size, -np.inf)
            for site in self._sites[group.name]:
                # Freed as they are compared: by now nothing else needs them.
                samples = torch.cat(self._kept.pop(site))
                max_by_unit(largest_distance(samples, classes), site.unit, best)
            scores[group.name] = best
        return scores
