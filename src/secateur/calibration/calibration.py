"""Calibration data that gives the same batches in the same order in every pass.

Scoring, allocating and repairing read the same data several times. Their results can be compared only if
every pass sees the same batches in the same order. `Calibration` makes sure of that, also for a loader that
shuffles or augments. It does not change the caller's random state.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from secateur.calibration.batch import Batch
from secateur.calibration.ending import check_ends, once, read_once
from secateur.calibration.randomness import OwnStream, seeded
from secateur.calibration.reading import Forward, Reading
from secateur.calibration.views import View, Views
from secateur.calibration.workers import living_workers
from secateur.common.computing import data_device
from secateur.common.seeds import seed_of
from secateur.errors import CalibrationError, SettingError


@dataclass(frozen=True, eq=False)
class _Part:
    """One side of `Calibration.split`: every `every`-th batch of `parent` if `held`, else all others.

    Each batch is first cut into `pieces`. `total` is the number of batches after that.
    """

    parent: Calibration
    pieces: int
    total: int
    every: int
    held: bool

    def _is_held(self, position: int) -> bool:
        # With fewer than `every` batches in all, the last one is held out.
        return position % self.every == self.every - 1 or (
            self.total < self.every and position == self.total - 1
        )

    def __iter__(self) -> Iterator[Any]:
        position = 0
        for index, raw in enumerate(self.parent.raw_batches()):
            pieces = [raw]
            if self.pieces > 1:
                pieces = [b.raw for b in Batch.of(raw, index, self.parent.reading).cut(self.pieces)]
            for piece in pieces:
                if self._is_held(position) == self.held:
                    yield piece
                position += 1

    def __len__(self) -> int:
        held = sum(self._is_held(i) for i in range(self.total))
        return held if self.held else self.total - held


@dataclass(frozen=True, eq=False)
class _Recut:
    """The batches of `parent`, cut to at most `size` samples; `total` is their number."""

    parent: Calibration
    size: int
    total: int = 0

    def __iter__(self) -> Iterator[Any]:
        for index, raw in enumerate(self.parent.raw_batches()):
            batch = Batch.of(raw, index, self.parent.reading)
            yield from (piece.raw for piece in batch.cut(-(-batch.size // self.size)))

    def __len__(self) -> int:
        return self.total


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration data that can be read many times, with the same batches in the same order.

    Make one with `Calibration.of`. Each pass has its own random state, which starts from `seed`. So a loader
    that shuffles or augments does it in the same way in each pass, and the caller's random state does not
    change. If a loader has its own `torch.Generator`, that generator starts each pass from the state it had
    when the Calibration was made, and gets its state back after the pass.

    Attributes:
        source: The user's loader or list of batches.
        seed: Seed of the random state of each pass.
        device: Device to which batches are moved; None leaves them where they are.
        reading: The rules by which batches are split into arguments and labels.
        views: In which views a pass yields each batch, one after the other; None: as it is.
        most: A pass ends with the batch that makes it so many samples; None: where the source ends.
    """

    source: Iterable[Any]
    seed: int = 0
    device: torch.device | None = None
    reading: Reading = field(default_factory=Reading, repr=False)
    views: Views | None = None
    most: int | None = None
    _start: tuple[tuple[torch.Generator, Tensor], ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        data: Any,
        *,
        seed: int = 0,
        batch_size: int = 64,
        samples: int | None = None,
        forward: Forward | None = None,
        whole: bool | None = None,
        model: nn.Module | None = None,
        views: int | Views | View | None = None,
    ) -> Calibration:
        """Make calibration data from the user's data.

        Args:
            data: One of: a DataLoader; a Dataset; an iterable of batches (`Reading` lists the forms of a
                batch); one tensor, mapping or tuple of tensors, which is one large batch and is cut into
                batches of `batch_size`; a Calibration, which is returned with the other settings given here.
                An iterator that can be read only once, such as a generator, is read into memory.
            seed: Seed of the random state of each pass.
            batch_size: Samples in a batch, if `data` does not define batches.
            samples: Read no more batches once there are so many samples, as data that never end need it.
            forward: ``forward(model, batch)`` calls the model on a batch of the loader, for example
                ``lambda model, batch: model(batch["image"])``. Then a batch can be of any type.
            whole: True: batches are never cut into samples; graphs and pairs, for example, must not be cut.
                None: secateur decides from the contents of a batch, and by running `model` on a few samples.
            model: The model that the batches are for.
            views: In how many views each sample serves, itself included: a number of crops and mirror images,
                or `Views`, or your own ``view(inputs, k, generator)``. None: one, or those of a Calibration.

        Raises:
            CalibrationError: `data` is none of these, or its samples are nothing that can be cropped.
            SettingError: `batch_size`, `samples` or the number of views is below 1.

        Example:
            >>> data = Calibration.of([(torch.zeros(2, 3), torch.tensor([0, 1]))] * 10)
            >>> fit, held_out = data.split(every=5)
            >>> len(list(fit)), len(list(held_out))
            (8, 2)
        """
        seed = seed_of(seed)
        if isinstance(data, Calibration):
            known: Calibration = data if samples is None else replace(data, most=samples)
            old = known.reading
            if (forward, whole) == (None, None) and (model is None or old.model is not None):
                return known._seen(views)
            kept = old.whole if whole is None else whole
            reading = Reading(model or old.model, forward or old.forward, kept)
            return replace(known, reading=reading)._with_tested_reading()._seen(views)
        reading = Reading(model, forward, whole)
        for name, value in (("batch_size", batch_size), ("samples", samples)):
            if value is not None and value < 1:
                raise SettingError(
                    f"calibration: expected {name} of at least 1, got {value}. Give a positive number."
                )
        if _is_batch(data):
            batch = Batch.of(data, reading=reading)
            pieces = [b.raw for b in batch.cut(-(-batch.size // batch_size))]
            return cls(pieces, seed, reading=reading)._seen(views)
        rows = hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, Iterable)
        if isinstance(data, Dataset) or rows:
            data = DataLoader(data, batch_size=batch_size)
        if isinstance(data, str | bytes) or not isinstance(data, Iterable):
            raise CalibrationError(
                f"calibration: expected a DataLoader, a Dataset or an iterable of batches, got "
                f"{type(data).__name__}. Give a list, for instance, of (inputs, labels)."
            )
        with seeded(seed):
            iterator = once(data)
            if iterator is not None:
                data = read_once(iterator if samples is None else _first(samples, iterator, reading))
        start = tuple((g, g.get_state()) for g in _generators(data))
        made = cls(data, seed, reading=reading, most=samples, _start=start)
        return made._with_tested_reading()._seen(views)

    def _seen(self, views: int | Views | View | None) -> Calibration:
        """The same data in these views; see `of`."""
        if views is None:
            return self
        asked = Views.of(views)
        if asked.number > 1:
            asked.seen(self.plain.first(), 1, self.seed)  # what cannot be seen otherwise is refused now
        return replace(self, views=asked)

    def _with_tested_reading(self) -> Calibration:
        """Return self after reading one batch.

        Reading can run the model, to find out which arguments it takes. It must do so now: later, hooks on
        the layers would see that run.
        """
        if self.reading.model is not None:
            for raw in self.raw_batches():
                self.reading.take(raw, "calibration batch 0")
                break
        return self

    def raw_batches(self) -> Iterator[Any]:
        """Yield the batches of the source as they are, with the random state of the pass."""
        raws = self._raws()
        return raws if self.most is None else _first(self.most, raws, self.reading)

    def _raws(self) -> Iterator[Any]:
        stream = OwnStream(self.seed, self._start)
        with stream.reading():
            iterator = iter(self.source)
        ends = self.most is not None or self._length() is not None
        for read in itertools.count(1):
            with stream.reading(), living_workers(read - 1):
                try:
                    raw = next(iterator)
                except StopIteration:
                    return
            if not ends:
                check_ends(read)
            yield raw

    def __iter__(self) -> Iterator[Batch]:
        """One pass, without a progress bar."""
        return self.batches()

    def batches(
        self,
        desc: str = "",
        progress: bool = False,
        takes: Callable[[int], bool] = lambda index: True,
        note: Callable[[Any], None] | None = None,
    ) -> Iterator[Batch]:
        """Read all data once.

        Args:
            desc: Purpose of the pass, shown beside the progress bar.
            progress: Show a progress bar on stderr, if that is a terminal.
            takes: Position of a batch -> whether to yield it. Skipped batches are still read from the source,
                so that its random draws stay the same.
            note: Sees each batch as the source gives it, those that are skipped too.

        Raises:
            CalibrationError: There is no batch, or a batch cannot be used. The message says which.
        """
        count = 0
        for raw in _with_bar(self.raw_batches(), desc, self._length(), progress):
            if note is not None:
                note(raw)
            for k in range(self.repeats):
                if takes(count):
                    batch = Batch.of(raw, count, self.reading)
                    batch.check_finite()
                    if self.reading.kinds is None:
                        self.reading.kinds = batch.kinds()
                    if self.views is not None:
                        batch = self.views.seen(batch, k, self.seed)
                    yield batch if self.device is None else batch.to(self.device)
                count += 1
        if count == 0:
            raise CalibrationError(
                "calibration: expected at least one batch, got an empty loader. Give some samples; "
                "with drop_last=True, a loader with less than one full batch gives none."
            )

    def first(self) -> Batch:
        """Return the first batch, for example to use it as example inputs."""
        for batch in self.batches():
            return batch
        raise CalibrationError("calibration: expected at least one batch, got none. Give some samples.")

    @property
    def repeats(self) -> int:
        """Number of views of each batch: a pass yields them one after the other."""
        return 1 if self.views is None else self.views.number

    @property
    def plain(self) -> Calibration:
        """The same data, each sample once and as it is."""
        return self if self.repeats == 1 else replace(self, views=Views(1))

    def samples(self) -> int:
        """Number of samples, each counted once whatever its views; reads all data."""
        return sum(batch.size for batch in self.plain)

    def count(self) -> int | None:
        """Number of batches in a pass, views included; None if the source does not know it."""
        length = self._length()
        return None if length is None else length * self.repeats

    def _length(self) -> int | None:
        """Number of batches of the source; None if it is not known before they are read."""
        if self.most is None and isinstance(self.source, Sized):
            try:
                return len(self.source)
            except TypeError:  # a DataLoader over an iterable dataset has a length that only raises
                return None
        return None

    def to(self, device: torch.device | str) -> Calibration:
        """Return the same data; each batch moves to `device`, or that of `compute_on`, when it is read."""
        return replace(self, device=data_device(torch.device(device)))

    def to_weights(self, device: torch.device) -> Calibration:
        """Return the same data; each batch moves to the weights' device, also inside `compute_on`.

        Gradients of weights, and the statistics of batch norms in training mode, must be there.
        """
        return replace(self, device=device)

    def fresh(self) -> Calibration:
        """Return the same data, where a pass shows each batch once, in another view for another seed."""
        return self if self.views is None else replace(self, views=self.views.fresh())

    def recut(self, size: int) -> Calibration:
        """Return the same data in batches of at most `size` samples. What cannot be cut stays whole."""
        pieces = _Recut(self, size)
        pieces = replace(pieces, total=sum(1 for _ in pieces))
        return replace(self, source=pieces, most=None, _start=())

    def split(self, every: int = 5) -> tuple[Calibration, Calibration]:
        """Hold out every `every`-th batch.

        If there are fewer than `every` batches, each is first cut along axis 0 into smaller ones, unless
        batches cannot be cut.

        Returns:
            The data to fit on, and the held-out data.

        Raises:
            CalibrationError: There is only one sample, or only one batch that cannot be cut.
            SettingError: `every` is below 2.
        """
        if every < 2:
            raise SettingError(
                f"calibration split: expected every of at least 2, got {every}. Give 5 to hold out a fifth."
            )
        total = self._length()
        if total is None:
            total = sum(1 for _ in self.raw_batches())
        pieces = 1
        whole = 0 < total < every and self.first().whole
        if 0 < total < every and not whole:
            pieces = -(-every // total)
            sizes = [batch.size for batch in self.plain]
            total = sum(min(size, pieces) for size in sizes)
        if total < 2:
            raise CalibrationError(
                f"calibration split: expected at least two {'batches' if whole else 'samples'}, got {total}. "
                "Pass more data, so that a part can be held out."
                + (" These batches cannot be cut: their samples depend on each other." if whole else "")
            )
        fit, held = (_Part(self, pieces, total, every, held) for held in (False, True))
        parts = [replace(self, source=part, most=None, _start=()) for part in (fit, held)]
        return parts[0], parts[1]


def _first(samples: int, raws: Iterator[Any], reading: Reading) -> Iterator[Any]:
    """The first batches, up to the one that makes it so many samples."""
    for index, raw in enumerate(raws):
        yield raw
        samples -= Batch.of(raw, index, reading).size
        if samples <= 0:
            return


def _is_batch(data: Any) -> bool:
    """Whether data are one batch: a tensor, a mapping, a tuple of tensors, or a pair (inputs, labels)."""
    if isinstance(data, Tensor | Mapping):
        return True
    if not isinstance(data, tuple) or not data:
        return False
    several = len(data) == 2 and isinstance(data[0], list | tuple | Mapping) and isinstance(data[1], Tensor)
    return several or all(isinstance(v, Tensor) for v in data)


def _generators(source: Any) -> list[torch.Generator]:
    """The random generators that a DataLoader and its samplers own, each once."""
    sampler = getattr(source, "sampler", None)
    batch_sampler = getattr(source, "batch_sampler", None)
    owners = (source, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _with_bar(raws: Iterator[Any], desc: str, total: int | None, progress: bool) -> Iterator[Any]:
    if not (progress and sys.stderr.isatty()):
        yield from raws
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(desc, total=total)
        for raw in raws:
            yield raw
            bar.advance(task)
