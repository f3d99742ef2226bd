"""What the pruned model may cost, and the search for the least removal that meets it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import JsonValue

from secateur.errors import BudgetError, UnreachableBudgetError

if TYPE_CHECKING:
    from secateur.cost import Cost


_COST = {
    "macs": "macs",
    "params": "params",
    "experts": "experts",
    "sparsity": "weights",
    "latency": "latency",
}
"""Per field of a budget, what it bounds: an attribute of the cost. No cost counts latency: it is measured."""


@dataclass(frozen=True)
class Budget:
    """The most that the pruned model may cost; where several are given, all hold.

    Each is either a float in (0, 1), a fraction of what the dense model costs, or an integer of at
    least 1, the cost itself.

    A rule's knob moves in steps, often of several units at once, and stops at the largest cost within the
    budget that it reaches. With `spend`, units that it took then come back one by one, the last to go
    first, while the budget holds: the cost comes within one unit of the budget, nothing that was paid for
    is lost, and rules can be compared at the same cost. ``spend=False`` leaves the plan to the knob alone.

    Attributes:
        macs: Multiply-accumulate operations for one sample.
        params: Number of parameters.
        experts: Routed experts in all blocks of a mixture-of-experts model.
        sparsity: Of the weights of linear layers and convolutions together, the fraction that is zero at
            least, a float in (0, 1). Biases, norms, embeddings and recurrent layers do not count: the plan
            and the report also say which share of all parameters is zero.
        spend: Whether to spend what the knob leaves of the budget.
        latency: Seconds of a forward pass over those of the dense model, a float in (0, 1). `secateur.prune`
            meets it by measuring a handful of plans on this machine, so the plan depends on the machine.

    Raises:
        BudgetError: None is given, one is neither such a fraction nor such an integer, or `spend` is no bool.

    Example:
        >>> Budget(macs=0.5, params=100_000).as_settings()
        {'macs': 0.5, 'params': 100000}
    """

    macs: float | int | None = None
    params: float | int | None = None
    sparsity: float | None = None
    spend: bool = True
    experts: float | int | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, value in self._asked().items():
            object.__setattr__(self, name, _amount(name, value))
        if isinstance(self.sparsity, int):
            raise BudgetError(
                f"budget: expected sparsity to be a float in (0, 1), got {self.sparsity}. Write sparsity=0.9."
            )
        if isinstance(self.latency, int):
            raise BudgetError(
                f"budget: expected latency to be a float in (0, 1), got {self.latency}. Write latency=0.6."
            )
        if not isinstance(self.spend, bool):
            raise BudgetError(
                f"budget: expected spend to be True or False, got {self.spend!r}. Write spend=False."
            )
        if not self._asked():
            raise BudgetError(
                "budget: expected macs or params, got neither, nor a sparsity. "
                "Write Budget(macs=0.5), for example."
            )

    def as_settings(self) -> dict[str, JsonValue]:
        """What was asked for, by name, as it is written into a plan."""
        return {**self._asked(), **({} if self.spend else {"spend": False})}

    def targets(self, dense: Cost) -> dict[str, int]:
        """The largest whole cost that each entry allows, by the cost's name.

        Raises:
            BudgetError: The cost is none of what is counted here: MACs of single weights, sparsity of
                units, or latency.
        """
        return {_COST[name]: _most(name, value, dense) for name, value in self._asked().items()}

    def _asked(self) -> dict[str, float | int]:
        """The bounds that are given, by their names here."""
        named = {name: getattr(self, name) for name in _COST}
        return {name: value for name, value in named.items() if value is not None}

    def met(self, cost: Cost, dense: Cost) -> bool:
        """True if `cost` is within every target."""
        return all(getattr(cost, name) <= target for name, target in self.targets(dense).items())


def solve(budget: Budget, dense: Cost, steps: int, cost_at: Callable[[int], Cost]) -> int:
    """The first step that meets the budget: the least removal, so the largest reachable cost within it.

    Bisection, which asks for about log2(`steps`) costs.

    Args:
        budget: What to meet.
        dense: Cost of the unpruned model.
        steps: Number of steps, at least 1.
        cost_at: Cost at a step in [0, steps); it never rises from one step to the next.

    Returns:
        The step, in [0, steps).

    Raises:
        UnreachableBudgetError: Not even the last step meets the budget. Its `smallest` is the least
            reachable cost in the budget's own terms: a fraction if a fraction was asked for, so that
            asking for exactly `smallest` succeeds.
    """
    least = cost_at(steps - 1)
    if not budget.met(least, dense):
        raise _unreachable(budget, least, dense)
    unmet, met = -1, steps - 1
    while met - unmet > 1:
        middle = (unmet + met) // 2
        if budget.met(cost_at(middle), dense):
            met = middle
        else:
            unmet = middle
    return met


def _unreachable(budget: Budget, least: Cost, dense: Cost) -> UnreachableBudgetError:
    complaints: list[str] = []
    advice: list[str] = []
    smallest: list[float] = []
    targets = budget.targets(dense)
    for name, asked in budget.as_settings().items():
        if name == "spend" or getattr(least, _COST[name]) <= targets[_COST[name]]:
            continue
        reached, whole, target = (
            getattr(least, _COST[name]),
            getattr(dense, _COST[name]),
            targets[_COST[name]],
        )
        complaints.append(
            f"expected at most {target:,} {_COST[name]} ({target / whole:.2%} of {whole:,}), "
            f"got {reached:,} ({reached / whole:.2%}) as the smallest that the allocator reaches"
        )
        if name == "sparsity":
            # Rounded down, so that the figure in the message is one that works.
            smallest.append((whole - reached) / whole)
            advice.append(f"sparsity={math.floor(smallest[-1] * 1e4) / 1e4:g}")
            continue
        fraction = not isinstance(asked, int)
        smallest.append(reached / whole if fraction else reached)
        # Rounded up, for the same reason.
        figure = f"{math.ceil(reached / whole * 1e4) / 1e4:g}" if fraction else str(reached)
        advice.append(f"{name}={figure}")
    bound = "at least" if budget.sparsity is None else "at most"
    return UnreachableBudgetError(
        f"budget: {'; '.join(complaints)}. Ask for {bound} {', '.join(advice)}, or loosen the limits "
        "(max_ratio, min_keep, round_to, ignore).",
        smallest=smallest[0],
    )


def _amount(name: str, value: object) -> float | int:
    """The value as a plain float in (0, 1) or a plain integer of at least 1."""
    if not isinstance(value, bool):
        try:
            whole = operator.index(value)  # type: ignore[arg-type]  # its TypeError tells a float from an integer
        except TypeError:
            try:
                share = float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                share = math.nan
            if 0 < share < 1 and not isinstance(value, str):
                return share
        else:
            if whole >= 1:
                return whole
    raise BudgetError(
        f"budget: expected {name} to be a fraction of the dense model, a float in (0, 1), or an absolute "
        f"cost, an integer of at least 1, got {value!r}. Write {name}=0.5 or {name}=1_000_000, for example."
    )


def _most(name: str, value: float | int, dense: Cost) -> int:
    """The largest whole cost that one bound allows."""
    whole = getattr(dense, _COST[name], None)
    if whole is None:
        other = {"sparsity": "granularity 'weight'", "experts": "granularity 'expert'"}.get(name)
        if name == "latency":
            other = "secateur.prune with granularity 'unit', which measures it"
        other = other or "granularity 'unit', or sparsity"
        raise BudgetError(f"budget: expected a bound on {sorted(vars(dense))}, got {name}. Use {other}.")
    if name != "sparsity":
        return value if isinstance(value, int) else _share(value, whole)
    gone = math.ceil(value * whole) + 1
    while gone and (gone - 1) / whole >= value:  # the quotient, as in `_share`
        gone -= 1
    return int(whole - gone)


def _share(fraction: float, whole: int) -> int:
    """The largest integer c with c / whole <= fraction.

    The quotient is compared, not the product, so that a cost's own fraction always admits that cost.
    """
    if whole == 0:
        return 0
    c = math.floor(fraction * whole) + 1
    while c / whole > fraction:
        c -= 1
    return c
