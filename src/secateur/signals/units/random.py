"""Random scores: the baseline for all other signals."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.signals.signal import Context, Need, Signal, Tally, Vector


@dataclass(frozen=True)
class Random(Signal):
    """Uniform random numbers in [0, 1), by the run's seed and the group's name.

    A group's numbers do not depend on the other groups, on the data, or on other signals.

    Direction: none; higher is kept, as everywhere. Needs no data.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> one, again = (sc.score(graph, None, sc.signals.Random(), seed=3)["random"]["0"] for _ in range(2))
        >>> bool((one == again).all())
        True
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _RandomTally(context)


class _RandomTally(Tally):
    def __init__(self, context: Context) -> None:
        self._context = context

    def finish(self) -> Mapping[str, Vector]:
        return {
            group.name: np.random.default_rng(_entropy(self._context.seed, group.name)).random(group.size)
            for group in self._context.graph.groups
        }


def _entropy(seed: int, name: str) -> list[int]:
    return [seed % 2**64, zlib.crc32(name.encode())]
