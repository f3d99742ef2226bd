"""Views: each sample serves several times, as it is and as crops or mirror images of itself.

View 0 is the batch as it is. Views are made after the data were read, batch by batch, so what holds a part of
the data out holds all views of its samples out. A crop depends on its sample, the seed and the view's number
alone: neither the pass nor the other samples of the batch matter.
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
"""``view(inputs, k, generator)``: the inputs of a batch, the view's number from 1 on, and random numbers ->
the same samples in the same order, seen in another way."""

AREA = 0.35
"""A crop shows at least this share of a picture's area."""

STRETCH = 4 / 3
"""Height and width of a crop are stretched against each other by at most this factor."""

SMALLEST = 4
"""Maps with fewer positions along an axis are not cropped: hardly anything would be left to see."""

_OWN = "Leave views out, or make them yourself: views=sc.Views(3, make=...)."


@dataclass(frozen=True, eq=False)
class Views:
    """In how many views each sample serves, and what they are.

    Attributes:
        number: Views of each sample, itself included; 1: no others.
        mirror: Whether a view may be a mirror image, left to right. None: pictures with three channels may,
            other maps not, since a mirrored digit or spectrum is something else.
        make: Your own ``view(inputs, k, generator)`` of a batch in place of crops, for k from 1 on. It gets
            what your loader gives as inputs: the first of ``(inputs, labels)``, or the whole batch where that
            is a tensor or a mapping, or is read by `forward`. It returns as many samples in the same order:
            labels are repeated.

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
    def of(cls, asked: int | Views | View) -> Views:
        """The views that a number, or a function of a batch, stands for."""
        if isinstance(asked, Views):
            return asked
        return cls(make=asked) if callable(asked) else cls(asked)

    def __post_init__(self) -> None:
        """Check the number."""
        if type(self.number) is not int or self.number < 1:
            raise SettingError(
                f"views: expected a number of at least 1, got {self.number!r}. Write views=3; 1 is off."
            )

    def fresh(self) -> Views:
        """One view of each batch in a pass, which the seed and the place of the batch decide.

        So passes with seeds one after another show all views of a batch in turn, each time with other crops.
        """
        return _Fresh(1, self.mirror, self.make, among=self.number)

    def seen(self, batch: Batch, k: int, seed: int) -> Batch:
        """View `k` of a batch; view 0 is the batch.

        Raises:
            CalibrationError: The samples are no maps, or `make` changed their number or gave no numbers.
        """
        if k == 0:
            return batch
        raw = self._cropped(batch, k, seed) if self.make is None else _made(self.make, batch, k, seed)
        found = Batch.of(raw, batch.index, batch.reading)
        if found.size != batch.size:
            raise CalibrationError(
                f"views, batch {batch.index}: expected {batch.size} samples, as many as make got, got "
                f"{found.size}. Return all samples in their order: labels are repeated."
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
        among: Number of views that the one of a pass is taken from.
    """

    among: int = 1

    def seen(self, batch: Batch, k: int, seed: int) -> Batch:
        """The view of a batch for this seed."""
        return super().seen(batch, (batch.index + seed) % self.among, seed)


def _made(make: View, batch: Batch, k: int, seed: int) -> Any:
    """The batch with the inputs that the user's function makes of a copy of them."""
    raw, generator = fresh(batch.raw), drawn_from(_inputs(batch)[0], k, seed)
    with seeded(generator.initial_seed()):
        if batch.reading.forward is not None or not isinstance(raw, list | tuple):
            return make(raw, k, generator)
        count = sum(any(entry is argument for argument in batch.args) for entry in batch.raw)
        if count > 1:  # the arguments themselves, not a tuple of them
            return [*make(tuple(raw[:count]), k, generator), *raw[count:]]
        return [make(raw[0], k, generator), *raw[1:]]


def drawn_from(sample: Tensor, k: int, seed: int) -> torch.Generator:
    """Random numbers that depend on some of a sample's values, the view's number and the seed alone."""
    values = sample.detach().reshape(-1)
    some = values[:: max(1, len(values) // 256)].to("cpu", torch.float64).numpy()
    digest = hashlib.blake2b(some.tobytes() + f"{k} {seed}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def crop(sample: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """A random part of a map, stretched to the whole map's size; with `mirror` mirrored in half of the cases.

    Args:
        sample: [channels, *sizes]
        generator: Draws the part.
        mirror: Whether it may be mirrored along the last axis.
    """
    sizes = sample.shape[1:]
    share, ratio, side, *starts = torch.rand(3 + len(sizes), generator=generator).tolist()
    area, stretch = AREA + (1 - AREA) * share, STRETCH ** (ratio - 0.5)
    factors = (area,) if len(sizes) == 1 else (math.sqrt(area) * stretch, math.sqrt(area) / stretch)
    part = sample[None] if sample.dtype == torch.float64 else sample[None].float()
    for axis, (size, factor, start) in enumerate(zip(sizes, factors, starts, strict=True)):
        length = min(size, max(1, round(size * factor)))
        part = part.narrow(2 + axis, int(start * (size - length + 1)), length)
    mode = "linear" if len(sizes) == 1 else "bilinear"  # only ever larger, so nothing can alias
    whole = F.interpolate(part, size=tuple(sizes), mode=mode, align_corners=False)[0]
    whole = whole.to(sample.dtype) if sample.is_floating_point() else whole.round().to(sample.dtype)
    return whole.flip(-1) if mirror and side < 0.5 else whole


def unsuitable(batch: Batch) -> str:
    """Why crops of a batch's samples would not do; empty where they do."""
    inputs = _inputs(batch)
    if len(inputs) != 1:
        return f"expected one input, a picture or another map, got {len(inputs)} tensors."
    (maps,) = inputs
    shape = list(maps.shape)
    if not maps.is_floating_point() and maps.dtype != torch.uint8:
        return (
            f"expected pictures or other maps, got {maps.dtype} {shape}. Other windows of a text are other "
            "samples: give more of it."
        )
    if maps.ndim != 4 and not (maps.ndim == 3 and _slid_along(batch.reading.model, shape[1])):
        return f"expected maps [batch, channels, height, width], got shape {shape}."
    if min(shape[2:]) < SMALLEST:
        return f"expected maps of at least {SMALLEST} positions along each axis, got shape {shape}."
    others, labels = [t for t in held_tensors(batch.raw) if not _equal(t, maps)], batch.labels
    if len(others) == len(held_tensors(batch.raw)):
        return "expected the input among the tensors that the loader gives, got one that forward makes."
    pair = batch.raw if isinstance(batch.raw, list | tuple) and len(batch.raw) == 2 else (None, None)
    elsewhere = (labels is None and pair[1] is not None) or any(
        labels is None or not _equal(t, labels) for t in others
    )
    if elsewhere or (labels is not None and labels.ndim > 2):
        return "expected labels that hold for a whole sample, got some that may say where in it."
    return ""


def _inputs(batch: Batch) -> list[Tensor]:
    return held_tensors((batch.args, batch.kwargs))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _slid_along(model: nn.Module | None, channels: int) -> bool:
    """Whether inputs [batch, channels, length] are series: a convolution slides along their last axis."""
    layers = () if model is None else model.modules()
    return any(isinstance(layer, nn.Conv1d) and layer.in_channels == channels for layer in layers)
