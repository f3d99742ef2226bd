"""What everyone who is compared does: make a smaller network for a draw and a share of the MACs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from benchmarks.frontier.workload import Draw


@dataclass(frozen=True)
class Made:
    """What an entrant made.

    Attributes:
        stages: Models by stage: ``pruned`` as it comes, then ``repaired`` or ``batchnorm``.
        seconds: By step, of processor time: with one thread what an idle core would take.
        notes: Plain data on how it came about.
    """

    stages: dict[str, nn.Module]
    seconds: dict[str, float]
    notes: dict[str, Any] = field(default_factory=dict)


class Entrant(Protocol):
    """One rule with its signals, of ours or of a peer."""

    @property
    def side(self) -> str:
        """Whose it is."""

    @property
    def name(self) -> str:
        """What it is called in results."""

    def made(self, draw: Draw, point: float) -> Made:
        """The network with the largest cost not above `point` of the dense MACs that the entrant reaches."""
