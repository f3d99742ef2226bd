"""Calibration data: whatever a user holds, as batches that every pass sees alike.

Scoring, allocating and repairing each go over the same data, some of them several times, and their results
are only comparable if every pass saw the same batches in the same order. `Calibration` promises that, also
for a loader that shuffles or augments, and leaves the caller's random state as it was.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from secateur.errors import CalibrationError, SettingError

LABEL_KEYS = ("labels", "label")
"""Keys of a mapping batch that hold its labels, in order of preference."""


@dataclass(frozen=True, eq=False)
class RandomState:
    """A snapshot of the random number generators that PyTorch, NumPy and Python share globally.

    Attributes:
        cpu: PyTorch's CPU generator.
        cuda: PyTorch's generator of each CUDA device; empty while CUDA is not in use.
        numpy: NumPy's legacy global generator, which augmentations still draw from.
        python: The generator of `random`.
        own: Generators that a loader brought, each with its state.
    """

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any
    own: tuple[tuple[torch.Generator, Tensor], ...] = ()

    @classmethod
    def capture(cls, generators: Iterable[torch.Generator] = ()) -> RandomState:
        """Read every generator, the loader's own `generators` included."""
        return cls(
            cpu=torch.get_rng_state(),
            cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
            numpy=np.random.get_state(),  # noqa: NPY002 the global generator itself is what is kept
            python=random.getstate(),
            own=tuple((g, g.get_state()) for g in generators),
        )

    def restore(self) -> None:
        """Put every generator back to where it was."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
        for generator, state in self.own:
            generator.set_state(state)


def _seed_everything(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block from `seed`, and leave the random state as it was, also after an exception.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(0):
        ...     a = torch.rand(2)
        >>> with seeded(0):
        ...     b = torch.rand(2)
        >>> bool((a == b).all()), bool((before == torch.get_rng_state()).all())
        (True, True)
    """
    outside = RandomState.capture()
    try:
        _seed_everything(seed)
        yield
    finally:
        outside.restore()


class _OwnStream:
    """A random stream for one pass, entered for each batch and left before the caller sees it.

    The caller draws random numbers between batches as it likes; neither stream moves the other.
    """

    def __init__(self, seed: int, start: tuple[tuple[torch.Generator, Tensor], ...]) -> None:
        self._generators = tuple(g for g, _ in start)
        outside = RandomState.capture(self._generators)
        try:
            _seed_everything(seed)
            for generator, state in start:
                generator.set_state(state)
            self._inside = RandomState.capture(self._generators)
        finally:
            outside.restore()
        self._outside = outside

    def __enter__(self) -> None:
        self._outside = RandomState.capture(self._generators)
        self._inside.restore()

    def __exit__(self, *exception: object) -> None:
        self._inside = RandomState.capture(self._generators)
        self._outside.restore()


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `change` to every tensor in nested mappings, lists and tuples; leave the rest alone."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(change, v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, v) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, v) for v in value)
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


@dataclass(frozen=True, eq=False)
class Batch:
    """One calibration batch, taken apart.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        labels: What the batch says the model should have answered, if it is a tensor. [size, ...]
        raw: What the user's loader gave, on the right device; `loss_fn` receives this.
        size: Number of samples: axis 0 of the first input tensor.
        index: Position of the batch in the pass, for messages.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None
    raw: Any
    size: int
    index: int = 0

    @classmethod
    def of(cls, raw: Any, index: int = 0) -> Batch:
        """Take `raw` apart.

        A tensor is the input. ``(inputs, labels)`` and ``(inputs,)`` hold the input first; `inputs` may be
        a list or tuple (several positional arguments) or a mapping (keyword arguments). A mapping holds
        keyword arguments, and its labels under ``labels`` or ``label``: ``labels`` also stays an argument,
        because models of that kind compute their loss from it, while ``label`` does not.

        Raises:
            CalibrationError: `raw` is none of these, holds no tensor, or holds no sample.

        Example:
            >>> batch = Batch.of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))
            >>> batch.size, len(batch.args), batch.labels
            (4, 1, tensor([0, 1, 0, 1]))
        """
        where = f"calibration batch {index}"
        inputs: Any
        labels: Any = None
        if isinstance(raw, Mapping):
            inputs = {k: v for k, v in raw.items() if k != "label"}
            labels = next((raw[k] for k in LABEL_KEYS if k in raw), None)
        elif isinstance(raw, Tensor):
            inputs = (raw,)
        elif isinstance(raw, list | tuple) and len(raw) in (1, 2):
            inputs = raw[0]
            labels = raw[1] if len(raw) == 2 else None
        else:
            got = (
                f"{type(raw).__name__} of {len(raw)}" if isinstance(raw, list | tuple) else type(raw).__name__
            )
            raise CalibrationError(
                f"{where}: expected (inputs, labels), (inputs,), a tensor or a mapping, got {got}. "
                "Do wrap several inputs in a tuple of their own: ((a, b), labels)."
            )
        args: tuple[Any, ...]
        kwargs: Mapping[str, Any]
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        elif isinstance(inputs, list | tuple):
            args, kwargs = tuple(inputs), {}
        else:
            args, kwargs = (inputs,), {}
        tensors = _tensors((args, {k: v for k, v in kwargs.items() if k not in LABEL_KEYS}))
        if not tensors:
            raise CalibrationError(
                f"{where}: expected inputs that are tensors, got {_kinds(inputs)}. Do convert them, for "
                "instance in the loader's collate_fn."
            )
        if tensors[0].ndim == 0 or len(tensors[0]) == 0:
            raise CalibrationError(
                f"{where}: expected inputs with at least one sample along axis 0, got shape "
                f"{list(tensors[0].shape)}. Do put samples along axis 0."
            )
        if labels is not None and not isinstance(labels, Tensor):
            labels = _as_tensor(labels)
        return cls(args, kwargs, labels, raw, len(tensors[0]), index)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`; dtypes stay as they are."""
        if all(t.device == torch.device(device) for t in _tensors(self.raw)):
            return self
        return Batch.of(map_tensors(lambda t: t.to(device), self.raw), self.index)

    def cut(self, pieces: int) -> list[Batch]:
        """Cut along axis 0 into at most `pieces` batches of nearly equal size, in order.

        Tensors whose axis 0 is not the number of samples are shared by all pieces.
        """
        pieces = min(pieces, self.size)
        bounds = [self.size * i // pieces for i in range(pieces + 1)]

        def part(tensor: Tensor, start: int, stop: int) -> Tensor:
            return tensor[start:stop] if tensor.ndim and len(tensor) == self.size else tensor

        return [
            Batch.of(map_tensors(partial(part, start=a, stop=b), self.raw), self.index)
            for a, b in pairwise(bounds)
        ]

    def classes(self) -> Tensor:
        """The class of each sample.

        Returns:
            int64 [size]

        Raises:
            CalibrationError: There are no labels, or they are not one non-negative integer a sample.
        """
        where = f"calibration batch {self.index}"
        labels = self.labels
        if labels is None:
            raise CalibrationError(
                f"{where}: expected labels, one class a sample, got none. Do give batches (inputs, labels)."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise CalibrationError(
                f"{where}: expected integer labels, got {labels.dtype}. "
                "Do give the index of each sample's class."
            )
        if labels.ndim != 1:
            raise CalibrationError(
                f"{where}: expected labels [{self.size}], one class a sample, got shape "
                f"{list(labels.shape)}. "
                "Do give the index of each sample's class."
            )
        if len(labels) != self.size:
            raise CalibrationError(
                f"{where}: expected {self.size} labels, one a sample, got {len(labels)}. "
                "Do check that inputs and labels belong together."
            )
        labels = labels.long()
        if int(labels.min()) < 0:
            raise CalibrationError(
                f"{where}: expected labels from 0, got label {int(labels.min())}. "
                "Do leave samples without a class out."
            )
        return labels

    def check_finite(self) -> None:
        """Raise CalibrationError if a floating input holds NaN or infinity."""
        for tensor in _tensors((self.args, self.kwargs)):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration batch {self.index}: expected finite inputs, got NaN or infinity in a "
                    f"tensor of shape {list(tensor.shape)}. Do clean the data."
                )


def _kinds(inputs: Any) -> str:
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if isinstance(values, list | tuple):
        return "nothing" if not values else ", ".join(sorted({type(v).__name__ for v in values}))
    return type(inputs).__name__


def _as_tensor(labels: Any) -> Tensor | None:
    """Labels given as numbers; None for what is no tensor at heart, such as a list of boxes."""
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None


@dataclass(frozen=True, eq=False)
class _Part:
    """Every `every`-th batch of `parent` (`held`), or all others, after cutting each into `pieces`."""

    parent: Calibration
    pieces: int
    total: int
    every: int
    held: bool

    def _is_held(self, position: int) -> bool:
        # Fewer pieces than `every` still leave one to hold out: the last.
        return position % self.every == self.every - 1 or (
            self.total < self.every and position == self.total - 1
        )

    def __iter__(self) -> Iterator[Any]:
        position = 0
        for index, raw in enumerate(self.parent.raw_batches()):
            pieces = [raw] if self.pieces == 1 else [b.raw for b in Batch.of(raw, index).cut(self.pieces)]
            for piece in pieces:
                if self._is_held(position) == self.held:
                    yield piece
                position += 1

    def __len__(self) -> int:
        held = sum(self._is_held(i) for i in range(self.total))
        return held if self.held else self.total - held


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches that can be gone over again and again, always the same ones in the same order.

    Make one with `Calibration.of`. Each pass runs from `seed` in a random state of its own: a shuffling or
    augmenting loader shuffles and augments the same way each time, and the caller's random state is not
    moved. A loader's own `torch.Generator` starts every pass from the state it had when the Calibration was
    made, and is put back after.

    Attributes:
        source: The user's loader or list of batches.
        seed: Where the random state of each pass starts.
        device: Where batches are moved; None leaves them where they are.
    """

    source: Iterable[Any]
    seed: int = 0
    device: torch.device | None = None
    _start: tuple[tuple[torch.Generator, Tensor], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, data: Any, *, seed: int = 0, batch_size: int = 64) -> Calibration:
        """Take calibration data as a user holds it.

        Args:
            data: A DataLoader; a Dataset; an iterable of batches (`Batch.of` lists what a batch may be); one
                tensor, mapping, or tuple of tensors, taken as a single large batch and cut to `batch_size`;
                or a Calibration, which comes back as it is. A one-shot iterator, such as a generator, is
                read once and its batches are kept in memory.
            seed: Where the random state of each pass starts.
            batch_size: Samples a batch, where `data` does not say.

        Raises:
            CalibrationError: `data` is none of these.
            SettingError: `batch_size` is below 1.

        Example:
            >>> data = Calibration.of([(torch.zeros(2, 3), torch.tensor([0, 1]))] * 10)
            >>> fit, held_out = data.split(every=5)
            >>> len(list(fit)), len(list(held_out))
            (8, 2)
        """
        if isinstance(data, Calibration):
            return data
        if batch_size < 1:
            raise SettingError(
                f"calibration: expected batch_size of at least 1, got {batch_size}. "
                "Do give a positive number."
            )
        if isinstance(data, Tensor | Mapping) or (
            isinstance(data, tuple) and data and all(isinstance(v, Tensor) for v in data)
        ):
            whole = Batch.of(data)
            return cls([b.raw for b in whole.cut(-(-whole.size // batch_size))], seed)
        rows = hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, Iterable)
        if isinstance(data, Dataset) or rows:
            data = DataLoader(data, batch_size=batch_size)
        if isinstance(data, str | bytes) or not isinstance(data, Iterable):
            raise CalibrationError(
                f"calibration: expected a DataLoader, a Dataset or an iterable of batches, got "
                f"{type(data).__name__}. Do give, for instance, a list of (inputs, labels)."
            )
        if isinstance(data, Iterator):
            with seeded(seed):
                data = list(data)
        return cls(data, seed, None, tuple((g, g.get_state()) for g in _generators(data)))

    def raw_batches(self) -> Iterator[Any]:
        """What the source gives, in the random state of the pass."""
        stream = _OwnStream(self.seed, self._start)
        with stream:
            iterator = iter(self.source)
        while True:
            with stream:
                try:
                    raw = next(iterator)
                except StopIteration:
                    return
            yield raw

    def __iter__(self) -> Iterator[Batch]:
        """One pass, without a progress bar."""
        return self.batches()

    def batches(self, desc: str = "", progress: bool = False) -> Iterator[Batch]:
        """One pass over the data.

        Args:
            desc: What the pass is for, shown beside the bar.
            progress: Show a bar on stderr, if that is a terminal.

        Raises:
            CalibrationError: There is no batch, or one cannot be used; the message says which.
        """
        count = 0
        for raw in _with_bar(self.raw_batches(), desc, self.count(), progress):
            batch = Batch.of(raw, count)
            batch.check_finite()
            yield batch if self.device is None else batch.to(self.device)
            count += 1
        if count == 0:
            raise CalibrationError(
                "calibration: expected at least one batch, got an empty loader. Do give some samples; "
                "with drop_last=True a loader shorter than one batch gives none."
            )

    def first(self) -> Batch:
        """The first batch, for instance as example inputs."""
        for batch in self.batches():
            return batch
        raise CalibrationError("calibration: expected at least one batch, got none. Do give some samples.")

    def count(self) -> int | None:
        """Number of batches in a pass, where the source knows it."""
        if isinstance(self.source, Sized):
            try:
                return len(self.source)
            except TypeError:  # a DataLoader over an iterable dataset has a length that only raises
                return None
        return None

    def to(self, device: torch.device | str) -> Calibration:
        """The same data, each batch moved to `device` as it is read."""
        return replace(self, device=torch.device(device))

    def split(self, every: int = 5) -> tuple[Calibration, Calibration]:
        """Set every `every`-th batch aside.

        With fewer than `every` batches each is first cut along axis 0 into smaller ones, so that there is
        something to hold out.

        Returns:
            The data to fit on, and the held-out data.

        Raises:
            CalibrationError: There is a single sample only.
            SettingError: `every` is below 2.
        """
        if every < 2:
            raise SettingError(
                f"calibration split: expected every of at least 2, got {every}. "
                "Do give 5 to hold out a fifth."
            )
        total = self.count()
        if total is None:
            total = sum(1 for _ in self.raw_batches())
        pieces = 1
        if 0 < total < every:
            pieces = -(-every // total)
            sizes = [batch.size for batch in self]
            total = sum(min(size, pieces) for size in sizes)
        if total < 2:
            raise CalibrationError(
                f"calibration split: expected at least two samples, got {total}. "
                "Do give more data, so that a part can be held out."
            )
        fit, held = (_Part(self, pieces, total, every, held) for held in (False, True))
        return Calibration(fit, self.seed, self.device), Calibration(held, self.seed, self.device)


def _generators(source: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers own, each once."""
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
