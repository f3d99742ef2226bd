"""The rule that knows what repair can undo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from secateur.allocate.global_ranking import Global
from secateur.score.combination import Asked


@dataclass(frozen=True)
class RepairAware(Global):
    """One threshold for all groups on the error that refitting cannot undo.

    The ``reconstruction`` signal says, for each unit, how much of what the group's consumers compute is lost
    for good once this unit and all that are easier to replace are gone, relative to what their outputs go
    into. It is on one scale for all groups, so a threshold on it spreads the damage that remains after
    ``sc.repair(..., "reconstruct")`` evenly, and no labels are needed. Pair the two.

    Source: ours; the elimination behind the signal is Hassibi and Stork's (1993).

    Attributes:
        ratio: Fraction of all units removed, in [0, 1). None if a budget decides.
        removal: The signal; another one should be in one unit for all groups.
    """

    removal: Asked = "reconstruction"
    normalise: str = field(default="none", init=False)
    name: ClassVar[str] = "repair_aware"
