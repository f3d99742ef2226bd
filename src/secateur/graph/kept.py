"""Which positions of a captured program's tensors stay once units are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.export import ExportedProgram

from secateur.errors import ApplyError
from secateur.graph.datasizes import measure_sizes
from secateur.graph.labels import Labels
from secateur.graph.rules.op import Value, Walk
from secateur.graph.walk import Tensor, walk

Mask = NDArray[np.bool_]
"""True for each position along an axis that stays. [axis size]"""

Removed = Mapping[str, Mapping[int, NDArray[np.int64]]]
"""Name of a tensor -> axis -> the positions that are removed."""


class Kept:
    """Which positions of the tensors in one program stay; made by `Labelled.kept`."""

    def __init__(self, walk: Walk, stays: Mask) -> None:
        self._walk = walk
        self._stays = stays  # by label
        self._found: dict[fx.Node, list[Any]] = {}

    def at(self, node: fx.Node) -> list[Any]:
        """Return which positions of a node's value stay.

        Returns:
            For a tensor, one mask for each axis. For several outputs, such a list for each of them. For
            anything else, an empty list.
        """
        if node not in self._found:
            self._found[node] = self._masks(self._walk.values.get(node))
        return self._found[node]

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a node if it is known without data, such as an index vector; else None."""
        return self._walk.constants.get(node)

    def along(self, labels: Labels) -> Mask:
        """Which positions with these labels stay."""
        return self._stays[np.maximum(labels, 0)]

    def _masks(self, value: Value) -> list[Any]:
        if isinstance(value, tuple):
            return [self.along(axis) for axis in value]
        return [self._masks(v) for v in value or ()]


@dataclass(frozen=True, eq=False)
class Labelled:
    """A captured program in which each position of each tensor has a label.

    Positions with the same label can only be removed together. So what is removed from the parameters says
    what is removed from every other tensor of the program.

    Attributes:
        program: The captured program.
    """

    program: ExportedProgram
    _walk: Walk
    _tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, program: ExportedProgram, *, head_sizes: bool) -> Labelled:
        """Label a captured program on its own; see `walk` for `head_sizes`."""
        measure_sizes(program)
        state, tensors, _ = walk(program, head_sizes=head_sizes)
        return cls(program, state, tuple(tensors))

    def kept(self, removed: Removed) -> Kept:
        """Which positions stay once these positions of parameters, buffers and constants are removed.

        Raises:
            ApplyError: In this program, more has to be removed together with these positions.
        """
        store = self._walk.store
        gone = [t.axes[axis][at] for t in self._tensors for axis, at in removed.get(t.name, {}).items()]
        roots = store.find(np.concatenate([*gone, np.zeros(0, np.int64)]))
        stays = np.ones(len(store), dtype=bool)
        stays[roots[roots > 0]] = False
        kept = Kept(self._walk, stays[np.maximum(store.find(np.arange(len(store), dtype=np.int64)), 0)])
        for tensor in self._tensors:
            for axis, labels in enumerate(tensor.axes):
                expected = np.ones(len(labels), dtype=bool)
                expected[removed.get(tensor.name, {}).get(axis, np.zeros(0, np.int64))] = False
                if not np.array_equal(kept.along(labels), expected):
                    raise ApplyError(
                        f"apply: expected {tensor.name} to lose along axis {axis} only what the plan "
                        f"removes, got further positions that belong to the same units at other sizes. "
                        f"Trace the model and plan again."
                    )
        return kept
