"""When to prune during training, and how far each time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from secateur.allocators import Budget
from secateur.errors import SettingError
from secateur.measure.cost import Cost


@dataclass(frozen=True)
class Schedule:
    """A schedule of pruning rounds that ends at a budget.

    With n rounds, round k takes place after step ``start + k * (end - start) / n``, rounded down. After it,
    the fraction ``1 - (1 - k / n)^3`` of the total removal is done (``linear``: ``k / n``). The cubic curve
    removes most in the early rounds, when there are many units and much training is left.

    Source: Zhu & Gupta 2017, To prune, or not to prune, arXiv 1710.01878, equation 1 with an initial
    sparsity of 0. Departures: their first pruning, at `start` itself, removes nothing and is left out here.
    They count zero weights; here MACs or parameters are counted.

    Attributes:
        budget: The MACs, parameters or both that the last round leaves. Fractions are relative to the
            model before the first round.
        start: The step after which pruning starts: an integer, or a float in [0, 1] as a fraction of all
            steps.
        end: The step of the last round, in the same units as `start`. With `every`, the last round may
            come earlier.
        rounds: The number of rounds.
        every: Steps between rounds. Give either `rounds` or `every`.
        curve: ``cubic`` or ``linear``.

    Raises:
        SettingError: If a value is out of range, or there are more rounds than steps.

    Example:
        >>> schedule = Schedule(Budget(macs=0.5), start=100, end=500, rounds=4)
        >>> schedule.steps
        (200, 300, 400, 500)
        >>> [schedule.target(k, Cost(params=10, macs=1000)).macs for k in (1, 2, 3, 4)]
        [710, 562, 507, 500]
    """

    budget: Budget
    start: int | float
    end: int | float
    rounds: int | None = None
    every: int | None = None
    curve: Literal["cubic", "linear"] = "cubic"

    def __post_init__(self) -> None:
        """Check the values."""
        asked = self.budget.as_settings() if isinstance(self.budget, Budget) else {}
        if not asked or asked.keys() - {"macs", "params", "spend"}:
            raise SettingError(
                f"schedule: expected a Budget of macs or params, got {self.budget!r}. Write Budget(macs=0.5)."
            )
        if self.curve not in ("cubic", "linear"):
            raise SettingError(f"schedule: expected curve 'cubic' or 'linear', got {self.curve!r}. Name one.")
        if (self.rounds is None) == (self.every is None):
            raise SettingError(
                f"schedule: expected either rounds or every, got {self.rounds} and {self.every}. Give one."
            )
        for name in ("rounds", "every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SettingError(
                    f"schedule: expected {name} to be an integer of at least 1, got {value!r}. Write "
                    f"{name}=10."
                )
        for name in ("start", "end"):
            value = getattr(self, name)
            if type(value) not in (int, float) or value < 0 or (type(value) is float and not value <= 1):
                raise SettingError(
                    f"schedule: expected {name} to be a step, an integer from 0, or a share of all steps, "
                    f"a float in [0, 1], got {value!r}. Write start=0 and end=0.8, for example."
                )
        if type(self.start) is type(self.end) and not self.start < self.end:
            raise SettingError(
                f"schedule: expected start before end, got {self.start} and {self.end}. Swap them."
            )
        if self.resolved:
            self._count()

    @property
    def resolved(self) -> bool:
        """Whether `start` and `end` are both steps, not fractions."""
        return type(self.start) is int and type(self.end) is int

    def over(self, total: float | None) -> Schedule:
        """Return this schedule with fractions converted to steps.

        Args:
            total: The number of all training steps.

        Raises:
            SettingError: If the schedule has fractions and `total` is missing.
        """
        if self.resolved:
            return self
        if total is None or not 0 < total < float("inf"):
            raise SettingError(
                f"schedule: expected the number of training steps, of which start={self.start} and "
                f"end={self.end} are shares, got {total}. Pass total=, or give start and end as integers."
            )
        start, end = (int(v * total) if type(v) is float else v for v in (self.start, self.end))
        return replace(self, start=start, end=end)

    @property
    def steps(self) -> tuple[int, ...]:
        """The step after which each round takes place, ascending.

        Raises:
            SettingError: If the schedule has fractions; call `over` first.
        """
        count, start = self._count(), int(self.start)
        if self.every is not None:
            return tuple(start + self.every * k for k in range(1, count + 1))
        return tuple(start + (int(self.end) - start) * k // count for k in range(1, count + 1))

    def due(self, step: int) -> int:
        """Return how many rounds are due once `step` steps have been taken."""
        return sum(step >= one for one in self.steps)

    def target(self, number: int, dense: Cost) -> Budget:
        """Return the budget of one round, in absolute MACs and parameters.

        Args:
            number: The round's number, from 1.
            dense: The model's cost before the first round.

        Raises:
            SettingError: If there is no such round.
        """
        count = self._count()
        if not 1 <= number <= count:
            raise SettingError(f"schedule: expected a round from 1 to {count}, got {number}. Pass one.")
        left = Fraction(count - number, count) ** (3 if self.curve == "cubic" else 1)
        bounds = {}
        for name, final in self.budget.targets(dense).items():
            whole = getattr(dense, name)
            bounds[name] = max(1, min(final, whole) + int((whole - min(final, whole)) * left))
        return Budget(macs=bounds.get("macs"), params=bounds.get("params"), spend=self.budget.spend)

    def _count(self) -> int:
        if not self.resolved:
            raise SettingError(
                f"schedule: expected steps, got shares {self.start} and {self.end}. Call over(total)."
            )
        steps = int(self.end) - int(self.start)
        count = self.rounds if self.every is None else steps // self.every
        if count is None or not 1 <= count <= steps:
            asked = f"{self.rounds} rounds" if self.every is None else f"one every {self.every}"
            raise SettingError(
                f"schedule: expected at least one step a round from {self.start} to {self.end}, got {asked}. "
                "Ask for fewer, or widen the range."
            )
        return count
