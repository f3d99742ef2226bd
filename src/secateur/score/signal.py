"""What a signal is: a way to say what each unit is worth.

A signal has two halves. `Signal` holds settings and is immutable; it says what it needs and where it looks.
`Tally` is what one scoring run accumulates. A new signal is one file with both, and one line in
`secateur.score.registry`; a user's own is passed to `sc.score` in place of a name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site

Need = Literal["weights", "activations", "labels", "gradients"]
"""What a signal reads. ``weights``: parameters alone, no data. ``activations``: the values at its sites.
``labels``: the class of each sample. ``gradients``: of the loss with respect to its tensors."""

Vector = NDArray[np.float64]
"""One score per unit. [group.size]"""


@dataclass(frozen=True, eq=False)
class Context:
    """What a scoring run is about.

    Attributes:
        graph: The traced model.
        tensors: Parameters and buffers by state-dict name, as aliases: same storage, not to be written.
        parameters: Which of them are parameters.
        seed: For what a signal draws at random.
    """

    graph: Graph
    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    seed: int


@dataclass(frozen=True, eq=False)
class Step:
    """One batch of the pass.

    Attributes:
        index: Position of the batch, for messages.
        size: Number of samples.
        classes: The class of each sample, if any signal needs labels. int64 [size]
    """

    index: int
    size: int
    classes: Tensor | None


class Tally(ABC):
    """The running state of one signal over one pass. For each batch: `begin`, `observe`, `gradients`."""

    def begin(self, step: Step) -> None:  # noqa: B027 a signal implements only what it needs
        """A batch starts."""

    def observe(self, group: Group, site: Site, value: Tensor, step: Step) -> None:  # noqa: B027
        """The activations at one of the signal's sites.

        Args:
            group: Whose units they are.
            site: Where; ``site.unit[i]`` is the unit of entry i.
            value: [step.size, entries, map], where map is whatever else the activation has (1 if nothing).
                Not to be written or, unless copied, kept.
            step: The batch.
        """

    def gradients(self, gradients: Mapping[str, Tensor], step: Step) -> None:  # noqa: B027
        """Gradients of the batch's mean loss with respect to the signal's tensors, by state-dict name.

        Multiply by ``step.size`` before adding batches up, so that scores do not depend on how samples are
        cut into batches.
        """

    @abstractmethod
    def finish(self) -> Mapping[str, Vector]:
        """One vector per group, by group name; higher is worth more."""


class Signal(ABC):
    """Settings of a way to score units."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    def sites(self, group: Group) -> tuple[Site, ...]:
        """Where to observe the group; used if the signal needs activations."""
        return group.sites

    def tensors(self, group: Group) -> tuple[str, ...]:
        """Whose gradients to take; used if the signal needs gradients. Producing parameters by default."""
        return tuple(s.tensor for s in group.of_role("produce"))

    @abstractmethod
    def start(self, context: Context) -> Tally:
        """Begin a run."""
