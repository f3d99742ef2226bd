"""How well a unit tells classes apart: the U-Score of FAIR-Pruner."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from secateur.calibration.batch import IGNORED
from secateur.common.mapped import empty_file, release
from secateur.errors import CalibrationError, ScoreError, SettingError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site, Stage
from secateur.signals.by_unit import max_by_unit, traced_map
from secateur.signals.diameter import diameters
from secateur.signals.observed import STAGES, sites_at, without_padding
from secateur.signals.signal import Context, Need, Signal, Step, Tally, Vector, require_shape

HELD_BYTES = 2**31
"""Most bytes of projections that stay in memory. The rest goes to temporary files (see `TMPDIR`)."""

_BLOCK = 2**28
"""Size of a temporary file. [bytes]"""

_READ = 2**28
"""Most bytes of projections that comparing classes reads at a time."""

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
    that memory does not grow with the data. Maps of another size than the traced one, as of texts of several
    lengths, are averaged to that size first. What is kept is, in bytes,
    4 · classes · per_class · projections · units, or twice that of a model in float64; what exceeds 2 GiB
    lies in temporary files. The largest distance
    is found exactly, but without visiting all pairs of classes (`secateur.signals.diameter`).

    Direction: small means that the unit tells no classes apart, so it is a candidate for removal.

    Attributes:
        projections: Number of directions for maps.
        per_class: Most samples of a class that are used.
        stage: Where to observe: the layer's own output (``produced``), after the normalisation that follows
            (``normalised``), or after the activation (``activated``). A layer without that stage is observed
            at the nearest earlier one; failing that, at its first.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> data = [(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1]))]
        >>> sc.score(graph, data, sc.signals.Wasserstein(), progress=False)["wasserstein"]["0"]
        array([1., 2., 3.])
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
                    f"wasserstein: expected {setting} of at least 1, got {value}. Give a positive number."
                )
        if self.stage not in STAGES:
            raise SettingError(
                f"wasserstein: expected stage to be one of {', '.join(STAGES)}, got {self.stage!r}. Name one."
            )

    def sites(self, group: Group) -> tuple[Site, ...]:
        """Every site of the asked-for stage, chosen for each producing layer on its own."""
        return sites_at(group, self.stage)

    def held(self, graph: Graph, classes: int) -> dict[str, int]:
        """4 · classes · per_class · projections · entries, over all sites; twice that in a float64 model."""
        entries = {group.name: sum(len(site.unit) for site in self.sites(group)) for group in graph.groups}
        return {name: 4 * classes * self.per_class * self.projections * n for name, n in entries.items()}

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


def resized(maps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Maps [samples, entries, *map] brought to another shape, each place the mean of those it stands for.

    Example:
        >>> resized(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), (2,))
        tensor([[[2., 6.]]])
    """
    shape = shape or (1,)  # one number a sample
    if tuple(maps.shape[2:]) == shape:
        return maps
    pools: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    if len(shape) != maps.ndim - 2 or len(shape) > len(pools):
        maps, shape = maps.flatten(2), (math.prod(shape),)
    found: Tensor = pools[len(shape) - 1](maps, list(shape))
    return found


def largest_distance(samples: Sequence[Tensor], classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Largest mean-over-projections Wasserstein-1 distance between two classes, for every entry.

    Quantile functions are step functions that jump at multiples of 1/n, n being the class's size. On the
    union of all classes' jumps each is a vector, and W_1 is the L1 distance of two of them, weighted by the
    lengths of the steps. With these multiplied in, the result is the L1 diameter of one point per class.

    A few entries are compared at a time, so that their points take 32 MiB; those of a single entry, 8 ·
    classes · projections · steps bytes, may take more.

    Args:
        samples: In parts, one after the other. Each [samples, entries, projections]
        classes: The class of each sample of all parts. [samples]

    Returns:
        [entries]

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1)
        >>> largest_distance([x], np.array([0, 0, 1, 1]))
        array([2.])
    """
    members: dict[int, list[NDArray[np.int64]]] = {}  # class size to the classes of that size
    for label in np.unique(classes):
        index = np.flatnonzero(classes == label)
        members.setdefault(len(index), []).append(index)
    device = samples[0].device
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
    _, entries, projections = samples[0].shape
    weights = (lengths / projections).to(device)
    chunk = max(1, _CHUNK // (count * (projections * steps + count)))
    found = []
    read = max(chunk, _READ // max(1, len(classes) * projections * samples[0].element_size()))
    for start in range(0, entries, read):
        whole = torch.cat([some[:, start : start + read].to(device) for some in samples])
        for part in whole.split(chunk, 1):
            points = [
                # [classes, n, entries, projections] -> [entries, classes, projections, n]
                _sorted(part[which].permute(2, 0, 3, 1))[..., shown].double() * weights
                for which, shown in gathers
            ]
            found.append(diameters(torch.cat(points, dim=1).flatten(2)).cpu().numpy())
    return np.concatenate(found)


def _sorted(values: Tensor) -> Tensor:
    """Sorted along the last axis."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))  # several times as fast as torch
    return values.sort(dim=-1).values


class _Store:
    """Keeps tensors in memory up to `HELD_BYTES`, and the rest in temporary files."""

    def __init__(self) -> None:
        self._bytes = 0
        self._file = torch.empty(0)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Return the tensor, or a copy of it in a file.

        Raises:
            ArtefactError: The disk has too little room.
        """
        if self._bytes + tensor.nbytes <= HELD_BYTES:
            self._bytes += tensor.nbytes
            return tensor
        if len(self._file) < self._used + tensor.numel() or self._file.dtype != tensor.dtype:
            release([self._file])
            size = max(tensor.numel(), _BLOCK // tensor.element_size())
            self._file, self._used = empty_file(size, tensor.dtype), 0
        place = self._file[self._used :][: tensor.numel()]
        self._used += tensor.numel()
        return place.view(tensor.shape).copy_(tensor)


class _WassersteinTally(Tally):
    def __init__(self, signal: Wasserstein, context: Context) -> None:
        self._signal = signal
        self._context = context
        self._seen: Counter[int] = Counter()  # samples of each class that are kept
        self._samples: list[tuple[int, int, int]] = []  # batch, position in it and class of each kept sample
        self._keep = torch.empty(0, dtype=torch.int64)  # which samples of the batch are kept
        self._directions: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._sites = {group.name: signal.sites(group) for group in context.graph.groups}
        self._store = _Store()
        self._kept: dict[Site, list[Tensor]] = {}  # [samples, entries, projections] of each batch
        sites = (site for sites in self._sites.values() for site in sites)
        self._maps = {site: traced_map(context.graph, site) for site in sites}
        for group in context.graph.groups:
            missing = group.size - len({int(u) for site in self._sites[group.name] for u in site.unit})
            if missing:
                raise ScoreError(
                    f"wasserstein, group {group.name}: expected every unit to be observable, got "
                    f"{missing} of {group.size} that are not. Exclude the group, or use a "
                    "signal that reads no activations."
                )

    def begin(self, step: Step) -> None:
        if step.classes is None:
            raise CalibrationError("wasserstein: expected labels, got none. Give batches (inputs, labels).")
        keep: list[int] = []
        for position, label in enumerate(step.classes.tolist()):
            if label != IGNORED and self._has_room(label):
                self._samples.append((step.index, position, label))
                keep.append(position)
        self._keep = torch.tensor(keep, dtype=torch.int64)

    def _has_room(self, label: int) -> bool:
        """Whether a further sample of this class is to be kept; if so, it is counted."""
        room = self._seen[label] < self._signal.per_class
        self._seen[label] += room
        return room

    def observe(self, group: Group, site: Site, value: Tensor, step: Step) -> None:
        if len(self._keep) == 0:
            return
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        parts = [
            resized(part.unflatten(2, (*step.map[:-1], -1)), self._maps[site]).flatten(2)
            for part in without_padding(value, step)
        ]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(self._keep) < step.size:
            value = value[self._keep.to(value.device)]
        projected = value @ self._direction(value)  # a new tensor, also for one number a unit
        if not bool(torch.isfinite(projected).all()):
            raise CalibrationError(
                f"wasserstein, group {group.name}: expected finite activations at {site.node}, got NaN or "
                "infinity. Check the data, and the model for overflow."
            )
        self._kept.setdefault(site, []).append(self._store.keep(projected))

    def _direction(self, value: Tensor) -> Tensor:
        key = (value.shape[2], value.dtype, value.device)
        if key not in self._directions:
            drawn = directions(value.shape[2], self._signal.projections, self._context.seed)
            self._directions[key] = drawn.to(value.device, value.dtype)
        return self._directions[key]

    def state(self) -> dict[str, Tensor]:
        """``samples`` [kept, 3]; then, by number of the site, the samples' projections."""
        found = {"samples": torch.tensor(self._samples, dtype=torch.int64).reshape(-1, 3)}
        for number, (_, site) in enumerate(self._all_sites()):
            if site in self._kept:
                found[f"projected.{number}"] = torch.cat(self._kept[site]).cpu()
        return found

    def _check(self, state: Mapping[str, Tensor], number: int, site: Site) -> None:
        """Check what a state holds of a site: projections of each sample and entry.

        Raises:
            ValueError: It has another shape or dtype.
        """
        samples, found = state["samples"], state.get(f"projected.{number}")
        require_shape("samples", samples, torch.int64, len(samples), 3)
        if found is not None:
            dtype = found.dtype if found.dtype == torch.float64 else torch.float32
            drawn = directions(math.prod(self._maps[site]), self._signal.projections, self._context.seed)
            require_shape(f"projected.{number}", found, dtype, len(samples), len(site.unit), drawn.shape[1])

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Of all states' samples, the first of each class in the order of the data."""
        samples: list[tuple[int, int, int]] = [
            (batch, position, label)
            for state in states
            for batch, position, label in state["samples"].tolist()
        ]
        self._seen.clear()
        rows = [
            row
            for row in sorted(range(len(samples)), key=samples.__getitem__)
            if self._has_room(samples[row][2])
        ]
        self._samples = [samples[row] for row in rows]
        self._kept.clear()
        device = next((t.device for t in self._context.tensors.values()), torch.device("cpu"))
        for number, (_, site) in enumerate(self._all_sites()):
            for state in states:
                self._check(state, number, site)
            holding = [state for state in states if f"projected.{number}" in state]
            if holding:
                joined = torch.cat([state[f"projected.{number}"] for state in holding])
                self._kept[site] = [joined[rows].to(device)]

    def _all_sites(self) -> Iterator[tuple[str, Site]]:
        """Every site with the name of its group, in a fixed order."""
        return ((name, site) for name, sites in self._sites.items() for site in sites)

    def finish(self) -> Mapping[str, Vector]:
        if len(self._seen) < 2:
            raise CalibrationError(
                f"wasserstein: expected samples of at least two classes, got "
                f"{f'only class {next(iter(self._seen))}' if self._seen else 'none'}. "
                "Give calibration data of several classes, or choose a signal that needs no labels."
            )
        classes = np.array([label for _, _, label in self._samples])
        scores: dict[str, Vector] = {}
        for group in self._context.graph.groups:
            best = np.full(group.size, -np.inf)
            for site in self._sites[group.name]:
                # Freed as they are compared: by now nothing else needs them.
                max_by_unit(largest_distance(self._kept.pop(site), classes), site.unit, best)
            scores[group.name] = best
        return scores
