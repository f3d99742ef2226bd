"""Random state: saved, seeded and given back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


class OwnStream:
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
