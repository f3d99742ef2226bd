"""What a choice among rules found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.allocate import Budget
from secateur.auto.contest import Contest
from secateur.score import Scores


@dataclass(frozen=True, eq=False)
class Choice:
    """What `choose` found.

    Attributes:
        rule: The winner, with what it has measured.
        budget: What all were held to.
        scores: Of all signals that the candidates needed and the data could feed.
        contest: What became of each candidate, the winner first.
    """

    rule: Any
    budget: Budget
    scores: Scores
    contest: Contest
