"""Views: use each sample several times, unchanged and as crops or mirror images.

View 0 is the unchanged batch. Views are made after the data were read, batch by batch, so if a sample is held
out, all its views are. A crop depends only on its sample, the seed and the view's number, not on the pass or
on the other samples of the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.calibration.batch import Batch, held_tensors, map_tensors
from secateur.calibration.randomness import seeded
from secateur.calibration.reading import fresh
from secateur.errors import CalibrationError, SettingError

View = Callable[[Any, int, torch.Generator], Any]
"""``view(inputs, k, generator)`` gets the inputs of a
batch, the view's number from 1 on, and a random generator. It returns changed samples in the same order."""

AREA = 0.35
"""A crop has at least this share of a picture's area."""

STRETCH = 4 / 3
"""The ratio of height and width of a crop is changed by at most this factor."""

SMALLEST = 4
"""Maps with fewer positions along an axis are not cropped: hardly anything would be left."""

_OWN = "Leave views out, or make them yourself: views=sc.Views(3, make=...)."


@dataclass(frozen=True, eq=False)
class Views:
    """The number of views of each sample, and their kind.

    Attributes:
        number: Views of each sample, with the sample itself; 1: no others.
        mirror: Whether views may be mirrored, left to right. None: only pictures with three channels, because
            a mirrored digit or spectrum means something else.
        make: Your own function ``view(inputs, k, generator)`` that replaces crops, for k from 1 on. It gets
            the inputs as your loader gives them: the first entry of ``(inputs, labels)``; or the whole batch,
            if that is a tensor or a mapping, or `forward` reads it. It must return equally many samples in
            the same order, because labels are repeated.

    Raises:
        SettingError: `number` is below 1.

    Example:
        >>> Views(3, mirror=False)
        Views(number=3, mirror=False, make=None)
    """

    number: int = 3
    mirror: bool | None = None
    make: View | None = None

    @classmethod
    def of(cls, views: int | Views | View) -> Views:
        """Make views from a number or from a function that makes views."""
        if isinstance(views, Views):
            return views
        return cls(make=views) if callable(views) else cls(views)

    def __post_init__(self) -> None:
        """Check the number."""
        if type(self.number) is not int or self.number < 1:
            raise SettingError(
                f"views: expected a number of at least 1, got {self.number!r}. Write views=3; 1 is off."
            )

    def fresh(self) -> Views:
        """Return views that show each batch once in a pass, in one view.

        The seed and the index of the batch decide which. So passes with consecutive seeds show all views of a
        batch in turn, each time with other crops.
        """
        return _Fresh(1, self.mirror, self.make, among=self.number)

    def seen(self, batch: Batch, k: int, seed: int) -> Batch:
        """Return view `k` of a batch; view 0 is the batch itself.

        Raises:
            CalibrationError: The samples are no maps, or `make` changed their number or returned NaN.
        """
        if k == 0:
            return batch
        raw = self._cropped(batch, k, seed) if self.make is None else _made(self.make, batch, k, seed)
        found = Batch.of(raw, batch.index, batch.reading)
        if found.size != batch.size:
            raise CalibrationError(
                f"views, batch {batch.index}: expected make to return {batch.size} samples, as many as it "
                f"got, got {found.size}. Return all samples in their order: labels are repeated."
            )
        found.check_finite()
        return found

    def _cropped(self, batch: Batch, k: int, seed: int) -> Any:
        why = unsuitable(batch)
        if why:
            raise CalibrationError(f"views, batch {batch.index}: {why} {_OWN}")
        (maps,) = _inputs(batch)
        mirror = maps.shape[1] == 3 and maps.ndim == 4 if self.mirror is None else self.mirror
        if mirror and k == 1:
            new = maps.flip(-1)
        else:
            new = torch.stack([crop(each, drawn_from(each, k, seed), mirror=mirror) for each in maps])
        return map_tensors(lambda t: new if _equal(t, maps) else t, batch.raw)


@dataclass(frozen=True, eq=False)
class _Fresh(Views):
    """See `Views.fresh`.

    Attributes:
        among: Number of views to choose from.
    """

    among: int = 1

    def seen(self, batch: Batch, k: int, seed: int) -> Batch:
        """Return the view of a batch for this seed."""
        return super().seen(batch, (batch.index + seed) % self.among, seed)


def _made(make: View, batch: Batch, k: int, seed: int) -> Any:
    """Return the batch with the inputs that the user's function makes from a copy of them."""
    raw, generator = fresh(batch.raw), drawn_from(_inputs(batch)[0], k, seed)
    with seeded(generator.initial_seed()):
        if batch.reading.forward is not None or not isinstance(raw, list | tuple):
            return make(raw, k, generator)
        count = sum(any(entry is argument for argument in batch.args) for entry in batch.raw)
        if count > 1:  # the batch has the arguments themselves, not a tuple of them
            return [*make(tuple(raw[:count]), k, generator), *raw[count:]]
        return [make(raw[0], k, generator), *raw[1:]]


def drawn_from(sample: Tensor, k: int, seed: int) -> torch.Generator:
    """Return a generator that depends only on some of a sample's values, the view's number and the seed."""
    values = sample.detach().reshape(-1)
    some = values[:: max(1, len(values) // 256)].to("cpu", torch.float64).numpy()
    digest = hashlib.blake2b(some.tobytes() + f"{k} {seed}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def crop(sample: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """Cut out a random part of a map, and resize it to the map's size. With `mirror`, mirror half of them.

    Args:
        sample: [channels, *sizes]
        generator: Chooses the part.
        mirror: Whether to mirror it along the last axis, in half of the cases.
    """
    sizes = sample.shape[1:]
    share, ratio, side, *starts = torch.rand(3 + len(sizes), generator=generator).tolist()
    area, stretch = AREA + (1 - AREA) * share, STRETCH ** (ratio - 0.5)
    factors = (area,) if len(sizes) == 1 else (math.sqrt(area) * stretch, math.sqrt(area) / stretch)
    part = sample[None] if sample.dtype == torch.float64 else sample[None].float()
    for axis, (size, factor, start) in enumerate(zip(sizes, factors, starts, strict=True)):
        length = min(size, max(1, round(size * factor)))
        part = part.narrow(2 + axis, int(start * (size - length + 1)), length)
    mode = "linear" if len(sizes) == 1 else "bilinear"  # it only gets larger, so there is no aliasing
    whole = F.interpolate(part, size=tuple(sizes), mode=mode, align_corners=False)[0]
    whole = whole.to(sample.dtype) if sample.is_floating_point() else whole.round().to(sample.dtype)
    return whole.flip(-1) if mirror and side < 0.5 else whole


def unsuitable(batch: Batch) -> str:
    """Return the reason why a batch cannot be cropped; empty if it can."""
    inputs = _inputs(batch)
    if len(inputs) != 1:
        return f"expected one input, a picture or another map, got {len(inputs)} tensors."
    (maps,) = inputs
    shape = list(maps.shape)
    if not maps.is_floating_point() and maps.dtype != torch.uint8:
        return (
            f"expected pictures or other maps, got {maps.dtype} {shape}. For text, use more samples instead."
        )
    if maps.ndim != 4 and not (maps.ndim == 3 and _slid_along(batch.reading.model, shape[1])):
        return f"expected maps [batch, channels, height, width], got shape {shape}."
    if min(shape[2:]) < SMALLEST:
        return f"expected maps of at least {SMALLEST} positions along each axis, got shape {shape}."
    others, labels = [t for t in held_tensors(batch.raw) if not _equal(t, maps)], batch.labels
    if len(others) == len(held_tensors(batch.raw)):
        return "expected an input that the loader gives, got one that forward makes."
    pair = batch.raw if isinstance(batch.raw, list | tuple) and len(batch.raw) == 2 else (None, None)
    elsewhere = (labels is None and pair[1] is not None) or any(
        labels is None or not _equal(t, labels) for t in others
    )
    if elsewhere or (labels is not None and labels.ndim > 2):
        return "expected labels of whole samples, got some that may belong to positions."
    return ""


def _inputs(batch: Batch) -> list[Tensor]:
    return held_tensors((batch.args, batch.kwargs))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _slid_along(model: nn.Module | None, channels: int) -> bool:
    """Whether inputs [batch, channels, length] are series: a convolution runs along their last axis."""
    layers = () if model is None else model.modules()
    return any(isinstance(layer, nn.Conv1d) and layer.in_channels == channels for layer in layers)
