"""The interface of rules that choose among allocators by measuring models, such as ``auto``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from secateur.allocators import Budget
from secateur.pipeline.auto.selection import Selection
from secateur.signals import Scores

if TYPE_CHECKING:
    from secateur.pipeline.targets.target import Scored, Target


@dataclass(frozen=True, eq=False)
class Choice:
    """The allocator that was chosen, and the measurements behind the choice.

    Attributes:
        rule: The best allocator, with the curves it measured.
        budget: The budget of all candidates.
        scores: Scores of all signals that candidates need, except those that the data cannot provide.
        selection: The results of all candidates, the best first.
    """

    rule: Any
    budget: Budget
    scores: Scores
    selection: Selection


class Chooser(ABC):
    """Chooses an allocator by measuring models that were pruned by several.

    Attributes:
        name: The name by which users choose it.
    """

    name: ClassVar[str]

    def check(self, function: str, granularity: str) -> None:  # noqa: B027 most can choose for all targets
        """Check that this can choose for a granularity.

        Args:
            function: The function that the user called, for the message.
            granularity: The granularity.

        Raises:
            SettingError: It cannot.
        """

    @abstractmethod
    def candidates_for(self, target: Target) -> Mapping[str, Any]:
        """The allocators, by the name that the report shows, whose signals must be scored."""

    @abstractmethod
    def choose(self, target: Target, budget: Budget | None = None, known: Scored | None = None) -> Choice:
        """Score once, let candidates plan for the same budget, and measure their models on held-out data.

        Args:
            target: The target, with the model and the data.
            budget: The budget of all candidates.
            known: Earlier result of `Target.score_candidates` for `candidates_for`, so as not to score again.

        Raises:
            NothingToPruneError: No candidate could run. The message gives the reason for each.
            UnreachableBudgetError: No candidate reaches the budget.
            BudgetError: There is no budget that could be used.
        """
