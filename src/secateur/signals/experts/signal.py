"""What a signal for experts has to be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.targets.experts.blocks import Block
from secateur.targets.experts.graph import ExpertGraph
from secateur.targets.experts.routing import Call, Routed

Need = Literal["routing", "gradients"]


@dataclass(frozen=True)
class Context:
    """What a run of scoring starts with.

    Attributes:
        graph: The trace.
        seed: For what draws.
    """

    graph: ExpertGraph
    seed: int

    @property
    def model(self) -> nn.Module:
        """The model that is scored."""
        return self.graph.model

    def zeros(self) -> dict[str, Tensor]:
        """A float64 sum for each expert of each block, on the model's device."""
        return {
            b.name: torch.zeros(b.count, dtype=torch.float64, device=self.graph.device)
            for b in self.graph.blocks
        }


class ExpertTally(ABC):
    """One signal's state while the data are read; memory does not grow with them."""

    def routed(self, call: Call, routed: Routed, tokens: Tensor) -> None:  # noqa: B027
        """After each call of a block, for `needs` ``routing``.

        Args:
            call: The call; ``call.again(tokens)`` repeats it for some tokens.
            routed: What was routed, without padding.
            tokens: Positions in the call of what `routed` holds. [tokens]
        """

    def gradient(  # noqa: B027
        self, block: Block, number: int | None, weight: Tensor, gradient: Tensor
    ) -> None:
        """For `needs` ``gradients``: one parameter of expert `number`, or of all (None), for each batch."""

    @abstractmethod
    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        """By block name one score an expert, 0 or more. [experts]"""


class ExpertSignal(ABC):
    """What an expert is worth; higher is worth more. `score` gathers all signals in one pass."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    @abstractmethod
    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""


class Mean(ExpertTally):
    """The sum of a number over the tokens that an expert got, divided by their number, or by all tokens.

    An expert that got none is worth 0.
    """

    def __init__(self, context: Context, measure: Callable[[Routed], Tensor], *, over_all: bool) -> None:
        self._measure, self._over_all = measure, over_all
        self._sums, self._counts = context.zeros(), context.zeros()

    def routed(self, call: Call, routed: Routed, tokens: Tensor) -> None:
        """Add what was routed."""
        name, index = call.block.name, routed.index[routed.valid].to(torch.int64)
        values = self._measure(routed)[routed.valid].double()
        self._sums[name].index_add_(0, index, values)
        count = self._counts[name]
        count += len(tokens) if self._over_all else torch.bincount(index, minlength=len(count))

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        """The means."""
        return {n: (s / self._counts[n].clamp_min(1)).cpu().numpy() for n, s in self._sums.items()}
