"""Find the readers of a group's units: layers, as regressions; or sites where activations are observed."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.calibration.padding import Padding
from secateur.errors import ScoreError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site
from secateur.repairs.regression.layers import Site as LayerCall
from secateur.repairs.regression.layers import counted
from secateur.repairs.regression.readers import LayerCalls


class Readers(LayerCalls):
    """The calls of layers that read units; for a group that no layer reads, its sites."""

    def __init__(self, graph: Graph, signal: str) -> None:
        """Find the calls.

        Args:
            graph: The traced model.
            signal: The signal's name, for messages.
        """
        super().__init__(graph)
        self._signal = signal

    def readers(self, group: Group) -> list[LayerCall | Site]:
        """Return the calls that read units of a group; if there are none, the group's sites.

        Raises:
            ScoreError: It has neither.
        """
        calls = dict.fromkeys(layer for piece in group.of_role("consume") for layer in self.of(piece))
        if not calls and not group.sites:
            raise ScoreError(
                f"{self._signal}, group {group.name}: expected a linear layer or convolution that reads it, "
                "or a place where its activations show, got neither. Choose another signal."
            )
        return list(calls) or list(group.sites)


def rows_at(site: Site, value: Tensor, padding: Padding) -> tuple[Tensor, Tensor | slice]:
    """Return the activations at a site as a matrix, with a row for each sample and position.

    Returns:
        [1, rows, entries], and the index of the rows that are no padding.
    """
    position = torch.as_tensor(site.position, device=value.device)
    entries = value.index_select(site.axis, position).movedim(site.axis, -1)  # [samples, ..., entries]
    rows = entries.reshape(1, -1, entries.shape[-1])
    samples = len(entries) if site.axis else 1  # without an axis of samples, there is one
    real = padding.real(samples, rows.shape[1] // max(1, samples), value.device)
    return rows, counted(real)
