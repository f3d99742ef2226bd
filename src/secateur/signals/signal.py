"""The contract of a signal, which gives each unit a score.

A signal has two halves. `Signal` holds settings and is immutable; it says what it needs and where it looks.
`Tally` is what one scoring run accumulates. A new signal is one file with both, and one line in
`secateur.signals.registry`; a user's own is passed to `sc.score` in place of a name.

A run can be cut short and resumed, and can be shared by several processes. For that a tally says what it
holds (`Tally.state`) and can take such states over (`Tally.merge`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from secateur.calibration.padding import NO_PADDING, Padding
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site

Need = Literal["weights", "activations", "labels", "gradients", "activation_gradients", "calls"]
"""What a signal reads. ``weights``: parameters alone, no data. ``activations``: the values at its sites.
``labels``: the class of each sample. ``gradients``: of the loss with respect to its tensors.
``activation_gradients``: the values at its sites together with the loss's gradients with respect to them.
``calls``: what operators of the captured program read and give, those that its tally names."""

Vector = NDArray[np.float64]
"""One score per unit. [group.size]"""


@dataclass(frozen=True, eq=False)
class Context:
    """What a tally needs to know of the run.

    Attributes:
        graph: The traced model.
        tensors: Parameters and buffers by state-dict name, as aliases: same storage, not to be written.
        parameters: Which of them are parameters.
        seed: For what a signal draws at random. Draw for each group on its own, from the seed and the group's
            name or shape: scores must not depend on which groups are scored together.
        memory: Most bytes that the run's tallies together may hold, for a signal that can hold less on
            request; None: no limit. The pass itself keeps to it by scoring few groups at a time, by what
            `Signal.held` says.
        views: In how many views each sample is shown; these are not independent of each other.
    """

    graph: Graph
    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    seed: int
    memory: int | None = None
    views: int = 1


@dataclass(frozen=True, eq=False)
class Step:
    """One batch of the pass.

    Attributes:
        index: Position of the batch in the calibration data, also when processes share them.
        size: Number of samples.
        classes: The class of each sample, if any signal needs labels; `IGNORED` for one without. int64 [size]
        map: The shape of the map of what is shown; other batches may have maps of other sizes.
        padding: Which positions of the batch are padding.
    """

    index: int
    size: int
    classes: Tensor | None
    map: tuple[int, ...] = ()
    padding: Padding = NO_PADDING


class Tally(ABC):
    """The running state of one signal over one pass over the data.

    For each batch: `begin`, `observe` and `call`, then `gradients` and `activation_gradients`.
    """

    def begin(self, step: Step) -> None:  # noqa: B027 a signal implements only what it needs
        """A batch starts."""

    def observe(self, group: Group, site: Site, value: Tensor, step: Step) -> None:  # noqa: B027
        """The activations at one of the signal's sites.

        Args:
            group: Whose units they are.
            site: Where; ``site.unit[i]`` is the unit of entry i.
            value: [step.size, entries, map], where map is whatever else the activation has (1 if nothing),
                flattened; `step.map` is its shape. Not to be written or, unless copied, kept.
            step: The batch.
        """

    def gradients(self, gradients: Mapping[str, Tensor], step: Step) -> None:  # noqa: B027
        """Gradients of the batch's mean loss with respect to the signal's tensors, by state-dict name.

        Multiply by ``step.size`` before adding batches up, so that scores do not depend on how samples are
        cut into batches.
        """

    def activation_gradients(  # noqa: B027
        self, group: Group, site: Site, value: Tensor, gradient: Tensor, step: Step
    ) -> None:
        """The activations at one of the signal's sites, and the loss's gradient with respect to them.

        Args:
            group: Whose units they are.
            site: Where; ``site.unit[i]`` is the unit of entry i.
            value: As in `observe`.
            gradient: Shaped like `value`; of the batch's mean loss. Multiply by ``step.size`` for the
                gradient of each sample's own loss.
            step: The batch.
        """

    def calls(self) -> Collection[str]:
        """Names of the nodes in ``context.graph.program.graph`` to show to `call`."""
        return ()

    def call(self, node: str, value: Tensor, read: Callable[[fx.Node], Any], step: Step) -> None:  # noqa: B027
        """What one of these nodes gave.

        Args:
            node: Its name.
            value: Its output. Not to be written or, unless copied, kept.
            read: The value of a node that it reads.
            step: The batch.
        """

    def state(self) -> dict[str, Tensor]:
        """What has been accumulated, as CPU tensors under short names: to be stored, or sent to a process.

        The default, nothing, is right for a signal that reads weights alone. The tensors may share memory
        with the tally; they are copied before the next batch.
        """
        return {}

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:  # noqa: B027
        """Replace what was accumulated by the union of these states.

        One state: a run that is resumed, bit for bit. Several: processes that each read a share of the data,
        in the order of their ranks; a share may be empty. Afterwards batches may follow, and `finish` gives
        what one run over all the data would have given.
        """

    @abstractmethod
    def finish(self) -> Mapping[str, Vector]:
        """One vector per group, by group name; higher is worth more."""


class SumTally(Tally):
    """A tally whose state is one number a unit, which adds up over samples, and the number of samples.

    A subclass adds to `sums` in `observe`, `gradients` or `activation_gradients`, and divides in `finish`;
    `begin` counts the samples, and `state` and `merge` are here.

    Attributes:
        context: What the run is about.
        samples: Number of samples so far, the current batch's included.
        sums: By group name, zeros at the start. float64 [group.size]
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.samples = 0
        self.sums: dict[str, Vector] = {group.name: np.zeros(group.size) for group in context.graph.groups}

    def begin(self, step: Step) -> None:
        """Count the batch's samples."""
        self.samples += step.size

    def state(self) -> dict[str, Tensor]:
        """The number of samples, and the sums of all groups one after the other."""
        sums = np.concatenate([np.zeros(0), *self.sums.values()])
        return {"samples": torch.tensor(self.samples), "sums": torch.from_numpy(sums)}

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the states up, in their order."""
        self.samples = sum(int(state["samples"]) for state in states)
        size = sum(map(len, self.sums.values()))
        for state in states:
            require_shape("sums", state["sums"], torch.float64, size)
        # Not sum(): 0 + (-0.0) is 0.0, and a resumed run is to be the same bit for bit.
        total = states[0]["sums"].numpy().copy()
        for state in states[1:]:
            total += state["sums"].numpy()
        ends = np.cumsum([len(vector) for vector in self.sums.values()])[:-1]
        self.sums = dict(zip(self.sums, np.split(total, ends), strict=True))


def require_shape(name: str, found: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a part of a state. One of another shape could be spread out silently.

    Raises:
        ValueError: It has another shape or dtype.
    """
    if (tuple(found.shape), found.dtype) != (shape, dtype):
        raise ValueError(
            f"{name[:80]} {list(found.shape)} of {found.dtype} in place of {list(shape)} of {dtype}"
        )
    return found


class TensorTally(Tally):
    """A tally whose state are tensors that add up."""

    @abstractmethod
    def held(self) -> dict[str, Tensor]:
        """The tensors by name."""

    def state(self) -> dict[str, Tensor]:
        """Copies of the tensors on the CPU, or themselves if they are there."""
        return {name: tensor.cpu() for name, tensor in self.held().items()}

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the states up, in their order."""
        for name, tensor in self.held().items():
            for state in states:
                require_shape(name, state[name], tensor.dtype, *tensor.shape)
            total = states[0][name].clone()
            for state in states[1:]:
                total += state[name]
            tensor.copy_(total)


class Signal(ABC):
    """Settings of a way to score units."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    def sites(self, group: Group) -> tuple[Site, ...]:
        """Where to observe the group; used if the signal needs activations or their gradients."""
        return group.sites

    def tensors(self, group: Group) -> tuple[str, ...]:
        """Whose gradients to take; used if the signal needs gradients. Producing parameters by default."""
        return tuple(s.tensor for s in group.of_role("produce"))

    def held(self, graph: Graph, classes: int) -> Mapping[str, int]:
        """Most bytes that a tally holds for each group while data of so many classes are read.

        Used with a memory limit, to choose how many groups to score at a time. The default, none, is right
        where it is a few numbers a unit.
        """
        return {}

    @abstractmethod
    def start(self, context: Context) -> Tally:
        """Begin a run."""
