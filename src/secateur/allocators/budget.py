"""Budgets: the most that a pruned model may cost, and the search for the smallest removal that meets it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from secateur.allocators.amounts import drop_of, latency_of, memory_of
from secateur.errors import BudgetError, UnreachableBudgetError

if TYPE_CHECKING:
    from secateur.measure.cost import Cost


_COST = {"macs": "macs", "params": "params", "experts": "experts", "blocks": "blocks", "sparsity": "weights"}
"""Field of a budget -> attribute of the cost that it bounds."""

CEILINGS = ("latency", "memory")
"""Bounds that are met by running models: the most that one may take."""

QUALITY = ("accuracy_drop", "loss_rise", "perplexity_rise")
"""Bounds on what pruning may damage. With one of these, the cost is made as small as it can be."""

CONDITIONS = {"tokens": None, "batch": None, "device": None, "backend": "eager", "confidence": 0.95}
"""Field of a budget -> its default, for fields that say how a bound is measured. They bound nothing."""

BACKENDS = ("eager", "compile", "onnxruntime")


@dataclass(frozen=True)
class Budget:
    """The most that the pruned model may cost, or lose. If several bounds are given, all must hold.

    `macs`, `params`, `experts` and `blocks` are counted. Each is either a float in (0, 1), a fraction of the
    dense model's cost, or an integer of at least 1, the cost itself. Every allocator meets them.

    `latency` and `memory` are measured, and `accuracy_drop`, `loss_rise` and `perplexity_rise` are decided on
    held-out data. Only `secateur.prune` meets these: it prunes by several plans from one scoring and looks.
    With a bound on cost it returns the largest model that is within. With one of the last three it returns
    the cheapest model for which held-out data confirm, with `confidence`, that it is within. See the guide
    to budgets.

    An allocator's knob often removes several units in one step, so it can stop well below the budget. With
    `spend`, removed units are then put back one by one, the last removed first, as long as the budget holds.
    So the cost ends within one unit of the budget, and allocators can be compared at equal cost. With
    ``spend=False`` the plan is the knob's alone.

    Attributes:
        macs: Multiply-accumulate operations for one sample.
        params: Number of parameters.
        experts: Routed experts in all blocks of a mixture-of-experts model.
        sparsity: The least fraction of zeros among the weights of linear layers and convolutions together, a
            float in (0, 1). Biases, norms, embeddings and recurrent layers do not count. The plan and the
            report also give the share of zeros among all parameters.
        spend: Whether to put units back as long as the budget holds.
        blocks: Residual blocks that stay, of those that could be dropped.
        latency: Time of a forward pass: a float in (0, 1), a share of the dense model's, or text with a unit,
            ``"30 ms"``. It is measured on this machine, on which the plan then depends.
        memory: Weights, buffers and the largest sum of what a forward pass holds at one time, and the
            key-value cache of `tokens` tokens: a float in (0, 1), a share of the dense model's, a number of
            bytes, or text with a unit, ``"512 MB"`` or ``"1.5 GiB"``.
        accuracy_drop: The most that the accuracy may drop, in (0, 1): 0.01 is one point. `metric` of
            `secateur.prune` replaces accuracy by another number a sample that is better when it is higher.
        loss_rise: The most that the mean loss may rise, as a fraction of the dense model's: 0.05 is 5 %.
        perplexity_rise: The same of exp(mean loss), which for language models is the perplexity.
        tokens: The number of tokens in the key-value cache that `memory` counts; None counts none.
        batch: Samples in the forward pass that is measured; None: those of the first calibration batch.
        device: Where models are measured, ``"cuda"`` for example; None: where the model is.
        backend: What runs the models that are timed: ``"eager"``, ``"compile"`` or ``"onnxruntime"``;
            ``"onnx"`` stands for the last.
        confidence: How sure it must be that a bound on quality holds, in [0.5, 1).

    Raises:
        BudgetError: No bound is given, or a value is none that its attribute can have.

    Example:
        >>> Budget(macs=0.5, params=100_000).as_settings()
        {'macs': 0.5, 'params': 100000}
        >>> Budget(accuracy_drop=0.01, latency="30 ms", backend="onnx").measured
        ('latency', 'accuracy_drop')
    """

    macs: float | int | None = None
    params: float | int | None = None
    sparsity: float | None = None
    spend: bool = True
    experts: float | int | None = None
    blocks: float | int | None = None
    latency: float | str | None = None
    memory: float | int | str | None = None
    accuracy_drop: float | str | None = None
    loss_rise: float | str | None = None
    perplexity_rise: float | str | None = None
    tokens: int | None = None
    batch: int | None = None
    device: str | None = None
    backend: str = "eager"
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Check the values."""
        for name, value in self._counted_bounds().items():
            object.__setattr__(self, name, _amount(name, value))
        for name in self.measured:
            object.__setattr__(self, name, _measured(name, getattr(self, name)))
        self._check_conditions()
        if isinstance(self.sparsity, int):
            raise BudgetError(
                f"budget: expected sparsity to be a float in (0, 1), got {self.sparsity}. Write sparsity=0.9."
            )
        if not isinstance(self.spend, bool):
            raise BudgetError(
                f"budget: expected spend to be True or False, got {self.spend!r}. Write spend=False."
            )
        if not self._counted_bounds() and not self.measured:
            raise BudgetError(
                "budget: expected macs or params, got neither, nor another bound. "
                "Write Budget(macs=0.5) or Budget(accuracy_drop=0.01), for example."
            )

    def _check_conditions(self) -> None:
        """Check what says how bounds are measured. One that changes nothing is refused."""
        if self.backend == "onnx":
            object.__setattr__(self, "backend", "onnxruntime")
        for name in ("tokens", "batch"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise BudgetError(f"budget: expected {name} of at least 1, got {value!r}. Write {name}=1.")
        if self.backend not in BACKENDS:
            raise BudgetError(
                f"budget: expected backend to be one of {', '.join(BACKENDS)}, got {self.backend!r}. "
                "Name one."
            )
        if not isinstance(self.confidence, float) or not 0.5 <= self.confidence < 1:
            raise BudgetError(
                f"budget: expected confidence in [0.5, 1), got {self.confidence!r}. Write confidence=0.95."
            )
        needed = {"tokens": ("memory",), "backend": ("latency",), "confidence": QUALITY}
        for name, default in CONDITIONS.items():
            bounds = needed.get(name, CEILINGS)
            if getattr(self, name) != default and not {*bounds} & {*self.measured}:
                raise BudgetError(
                    f"budget: expected {name} together with {' or '.join(bounds)}, got it alone. "
                    "Leave it out."
                )

    def as_settings(self) -> dict[str, JsonValue]:
        """The given bounds by name, as they are stored in a plan, and what says how they are measured."""
        named = {name: getattr(self, name) for name in self.measured}
        further = {n: getattr(self, n) for n, value in CONDITIONS.items() if getattr(self, n) != value}
        return {**self._counted_bounds(), **named, **further, **({} if self.spend else {"spend": False})}

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the bounds that need models and data, which only `secateur.prune` has."""
        return tuple(name for name in (*CEILINGS, *QUALITY) if getattr(self, name) is not None)

    @property
    def quality(self) -> tuple[str, ...]:
        """Names of the bounds on what pruning may damage."""
        return tuple(name for name in QUALITY if getattr(self, name) is not None)

    def counted(self, **bounds: float | int) -> Budget:
        """The bounds that allocators meet by counting, with others in place of some of them."""
        return Budget(**{**self._counted_bounds(), **bounds}, spend=self.spend)  # type: ignore[arg-type]

    @property
    def weighs(self) -> Literal["macs", "params"]:
        """The cost by which rules weigh units: that of parameters where it bounds these and not MACs."""
        return "params" if self.params is not None and self.macs is None else "macs"

    def targets(self, dense: Cost) -> dict[str, int]:
        """The largest integer cost that each bound allows, by the name of the cost.

        Raises:
            BudgetError: `dense` does not count what a bound is about, for example MACs of single weights,
                sparsity of units, or a bound is a measured one.
        """
        for name in self.measured:
            raise BudgetError(
                f"budget: expected a bound that can be counted, got {name}. Use secateur.prune, which "
                "measures it."
            )
        return {_COST[name]: _most(name, value, dense) for name, value in self._counted_bounds().items()}

    def _counted_bounds(self) -> dict[str, float | int]:
        """The counted bounds that are not None, by name."""
        named = {name: getattr(self, name) for name in _COST}
        return {name: value for name, value in named.items() if value is not None}

    def met(self, cost: Cost, dense: Cost) -> bool:
        """Whether `cost` is within all bounds."""
        return all(getattr(cost, name) <= target for name, target in self.targets(dense).items())


def solve(budget: Budget, dense: Cost, steps: int, cost_at: Callable[[int], Cost]) -> int:
    """Find the first step that meets the budget, by bisection.

    The first such step removes the least, so its cost is the largest within the budget. Computes about
    log2(`steps`) costs.

    Args:
        budget: The budget to meet.
        dense: Cost of the unpruned model.
        steps: Number of steps, at least 1.
        cost_at: Step in [0, steps) -> cost. The cost must never rise from one step to the next.

    Returns:
        The step, in [0, steps).

    Raises:
        UnreachableBudgetError: Even the last step does not meet the budget. Its attribute `smallest` is the
            smallest cost that can be reached, in the form of the budget: a fraction if the budget is a
            fraction. A budget of exactly `smallest` can be met.
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
    for name, bound in budget.as_settings().items():
        if name not in _COST or getattr(least, _COST[name]) <= targets[_COST[name]]:
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
            # Round down: the sparsity that the message suggests must be reachable.
            smallest.append((whole - reached) / whole)
            advice.append(f"sparsity={math.floor(smallest[-1] * 1e4) / 1e4:g}")
            continue
        fraction = not isinstance(bound, int)
        smallest.append(reached / whole if fraction else reached)
        # Round up: the cost that the message suggests must be reachable.
        figure = f"{math.ceil(reached / whole * 1e4) / 1e4:g}" if fraction else str(reached)
        advice.append(f"{name}={figure}")
    direction = "at least" if budget.sparsity is None else "at most"
    return UnreachableBudgetError(
        f"budget: {'; '.join(complaints)}. Ask for {direction} {', '.join(advice)}, or loosen the limits "
        "(max_ratio, min_keep, round_to, ignore).",
        smallest=smallest[0],
    )


def _measured(name: str, value: object) -> float | int | str:
    """Convert a measured bound to the value that a budget keeps."""
    if name == "latency":
        return latency_of(value)
    if name == "memory":
        return memory_of(value)
    return drop_of(name, value, 1.0 if name == "accuracy_drop" else math.inf)


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
    """The largest integer cost that one bound allows."""
    whole = getattr(dense, _COST[name], None)
    if whole is None:
        kinds = {"sparsity": "weight", "experts": "expert", "blocks": "block"}
        other = f"granularity {kinds[name]!r}" if name in kinds else None
        other = other or "granularity 'unit', or sparsity"
        known = " or ".join(bound for bound, cost in _COST.items() if hasattr(dense, cost))
        raise BudgetError(f"budget: expected a bound on {known}, got {name}. Use {other}.")
    if name != "sparsity":
        return value if isinstance(value, int) else _share(value, whole)
    gone = math.ceil(value * whole) + 1
    while gone and (gone - 1) / whole >= value:  # compares quotients; `_share` says why
        gone -= 1
    return int(whole - gone)


def _share(fraction: float, whole: int) -> int:
    """The largest integer c with c / whole <= fraction.

    It compares the quotient and not the product ``fraction * whole``, which rounding can make too small. So
    if `fraction` was computed as ``cost / whole``, the result is `cost`.
    """
    if whole == 0:
        return 0
    c = math.floor(fraction * whole) + 1
    while c / whole > fraction:
        c -= 1
    return c
