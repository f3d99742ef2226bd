"""Save, seed and restore the state of all random number generators.

PyTorch, NumPy and Python each have one generator for all threads. So only one thread at a time may be inside
a block in which they are seeded, and others wait. Tracing, which PyTorch can do in only one thread at a time,
is inside such a block, too.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALONE = threading.RLock()
"""The lock of the thread that has set the global generators."""


def generator_states() -> list[Tensor]:
    """Return the states of PyTorch's CPU generator and, if CUDA is in use, of each device's generator."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


@dataclass(frozen=True, eq=False)
class RandomState:
    """A snapshot of the random number generators that PyTorch, NumPy and Python share globally.

    Attributes:
        cpu: PyTorch's CPU generator.
        cuda: PyTorch's generator of each CUDA device; empty if CUDA is not in use.
        numpy: NumPy's legacy global generator. Augmentations still use it.
        python: The generator of `random`.
        own: The loader's own generators, each with its state.
    """

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any
    own: tuple[tuple[torch.Generator, Tensor], ...] = ()

    @classmethod
    def capture(cls, generators: Iterable[torch.Generator] = ()) -> RandomState:
        """Read the state of all global generators and of `generators`."""
        cpu, *cuda = generator_states()
        return cls(
            cpu=cpu,
            cuda=tuple(cuda),
            numpy=np.random.get_state(),  # noqa: NPY002 it is the global generator that must be saved
            python=random.getstate(),
            own=tuple((g, g.get_state()) for g in generators),
        )

    def restore(self) -> None:
        """Set all generators back to the saved state."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
        for generator, state in self.own:
            generator.set_state(state)

    def insist(self) -> None:
        """Restore. If Ctrl-C interrupts this, restore again."""
        try:
            self.restore()
        except BaseException:
            self.restore()
            raise


def _seed_everything(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all generators inside the ``with`` block, and restore them afterwards, also after an exception.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(0):
        ...     a = torch.rand(2)
        >>> with seeded(0):
        ...     b = torch.rand(2)
        >>> bool((a == b).all()), bool((before == torch.get_rng_state()).all())
        (True, True)
    """
    with _ALONE:
        outside = RandomState.capture()
        try:
            _seed_everything(seed)
            yield
        finally:
            outside.insist()


class OwnStream:
    """The random state of one pass over the data, active only while a batch is being read.

    Each batch is read in a block of its own (``with stream.reading():``), after which the caller's random
    state is back. So the caller can draw random numbers between batches, and neither side changes the
    numbers of the other.
    """

    def __init__(self, seed: int, start: tuple[tuple[torch.Generator, Tensor], ...]) -> None:
        self._generators = tuple(g for g, _ in start)
        with _ALONE:
            outside = RandomState.capture(self._generators)
            try:
                _seed_everything(seed)
                for generator, state in start:
                    generator.set_state(state)
                self._inside = RandomState.capture(self._generators)
            finally:
                outside.insist()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The block in which a batch is read."""
        with _ALONE:
            outside = RandomState.capture(self._generators)
            try:
                self._inside.restore()
                yield
                self._inside = RandomState.capture(self._generators)
            finally:
                outside.insist()
