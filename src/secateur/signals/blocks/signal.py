"""What a signal for residual blocks has to be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.targets.blocks.graph import BlockGraph

Need = Literal["streams", "outputs", "gradients"]


@dataclass(frozen=True)
class Context:
    """What a run of scoring starts with.

    Attributes:
        graph: The trace.
        seed: For what draws.
    """

    graph: BlockGraph
    seed: int

    @property
    def model(self) -> nn.Module:
        """The model that is scored."""
        return self.graph.model

    def by_group(self, values: Mapping[str, float]) -> dict[str, NDArray[np.float64]]:
        """Values of blocks by path as one vector for each group. [blocks]"""
        return {
            name: np.array([values.get(block.path, 0.0) for block in blocks], dtype=np.float64)
            for name, blocks in self.graph.blocks.items()
        }


class BlockTally(ABC):
    """One signal's state while the data are read; memory does not grow with them."""

    def stream(self, path: str, before: Tensor, after: Tensor) -> None:  # noqa: B027
        """After each call of a block, for `needs` ``streams``.

        Args:
            path: The block's.
            before: What it read, without padding. [positions, width]; of maps, a row for each sample.
            after: What it gave.
        """

    def output(self, path: str, change: float, size: float) -> None:  # noqa: B027
        """For each batch and block, for `needs` ``outputs``.

        Args:
            path: The block's.
            change: Sum of squares of what the model's outputs change if this block alone is bypassed.
            size: Sum of squares of the outputs.
        """

    def gate(self, path: str, derivative: float) -> None:  # noqa: B027
        """For each batch, for `needs` ``gradients``: the loss by a factor on what the block adds."""

    @abstractmethod
    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        """By group one score a block, 0 or more. [blocks]"""


class BlockSignal(ABC):
    """What a residual block is worth; higher is worth more. `score` gathers all signals in one pass."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    @abstractmethod
    def start(self, context: Context) -> BlockTally:
        """Begin a run."""


class Quotient(BlockTally):
    """For each block one sum divided by another."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._above: dict[str, float] = {}
        self._below: dict[str, float] = {}

    def add(self, path: str, above: float, below: float) -> None:
        """Add to both sums of a block."""
        self._above[path] = self._above.get(path, 0.0) + above
        self._below[path] = self._below.get(path, 0.0) + below

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        """The quotients; 0 where nothing was seen."""
        return self._context.by_group({p: v / (self._below[p] or 1.0) for p, v in self._above.items()})
