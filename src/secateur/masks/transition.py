"""At which sparsity each rule stops being recoverable by repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from secateur.allocate import Budget, resolve
from secateur.allocate.registry import Allocates
from secateur.calibration import Calibration
from secateur.errors import UnreachableBudgetError
from secateur.evaluate import Evaluation, evaluate
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.masks.allocate import allocate
from secateur.masks.apply import apply
from secateur.masks.distortion import with_curves
from secateur.masks.plan import MaskPlan
from secateur.masks.score import score
from secateur.masks.surgeon import surgeon
from secateur.masks.weights import Weights
from secateur.repair.batchnorm import batch_norms, reestimate
from secateur.repair.sweep import sweep as refit


@dataclass(frozen=True)
class Point:
    """One rule at one sparsity, repaired.

    Attributes:
        rule: Its name.
        sparsity: The fraction of the weights that was asked to be zero.
        loss: Of the repaired model.
        accuracy: Top-1, None where it is not defined.
    """

    rule: str
    sparsity: float
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Transition:
    """What a sweep over sparsities found.

    Attributes:
        dense: The dense model's loss and accuracy.
        points: One for each rule and sparsity that the rule reaches.
        share: What of the dense model's accuracy counts as recovered.
    """

    dense: Evaluation
    points: tuple[Point, ...]
    share: float

    def recovered(self, point: Point) -> bool:
        """Whether a point holds the share of the dense accuracy; by loss, 1 / share of the loss at most."""
        if self.dense.accuracy is not None and point.accuracy is not None:
            return point.accuracy >= self.share * self.dense.accuracy
        return point.loss * self.share <= self.dense.loss

    def last(self, rule: str) -> float | None:
        """The sparsity up to which every point of a rule is recovered; None if not even the first is."""
        found = None
        for point in sorted((p for p in self.points if p.rule == rule), key=lambda p: p.sparsity):
            if not self.recovered(point):
                break
            found = point.sparsity
        return found


def sweep(
    model: nn.Module,
    fit: Calibration,
    held: Calibration,
    rules: Mapping[str, str | Allocates],
    sparsities: Sequence[float],
    *,
    criterion: str = "magnitude",
    repair: str = "variance",
    share: float = 0.95,
    seed: int = 0,
) -> Transition:
    """Allocates with each rule at each sparsity, repairs all with the same repair, and measures.

    The repair is always kept, unlike in `sc.repair`: what is compared is the repaired models.

    Args:
        model: The dense model, which is left as it was.
        fit: What scores, curves and repairs read.
        held: What is measured on; with labels.
        rules: By the name they are shown under, allocators: their names or instances.
        sparsities: Fractions of the weights that go.
        criterion: Which weights of a layer go first: one of `secateur.masks.CRITERIA`.
        repair: One of `REPAIRS`.
        share: Of the dense accuracy, what counts as recovered.
        seed: Seed for all random choices.
    """
    example = fit.first()
    graph = trace(model, example.inputs, allow_inexact=True)
    points = []
    for name, sparsity, plan in allocations(model, fit, rules, sparsities, criterion=criterion, seed=seed):
        small = apply(model, plan, graph)
        REPAIRS[repair](Masked(small, model, plan, graph), fit)
        found = evaluate(small, held)
        points.append(Point(name, sparsity, found.loss, found.accuracy))
    return Transition(evaluate(model, held), tuple(points), share)


def allocations(
    model: nn.Module,
    fit: Calibration,
    rules: Mapping[str, str | Allocates],
    sparsities: Sequence[float],
    *,
    criterion: str = "magnitude",
    seed: int = 0,
) -> Iterator[tuple[str, float, MaskPlan]]:
    """Each rule's masks at each sparsity that it reaches; arguments as for `sweep`."""
    scores = score(model, fit, criterion, seed=seed)
    weights = Weights.of(model)
    for name, given in rules.items():
        rule = with_curves(_with_criterion(resolve(given), criterion), model, fit, scores)
        for sparsity in sparsities:
            try:
                plan = allocate(weights, scores, rule, Budget(sparsity=sparsity), seed=seed)
            except UnreachableBudgetError:
                continue
            yield name, sparsity, plan


def _with_criterion(rule: Any, criterion: str) -> Any:
    return rule if rule.signals == ("random",) else replace(rule, removal=criterion)


@dataclass(frozen=True, eq=False)
class Masked:
    """What a repair of an allocation works on.

    Attributes:
        small: The masked model, which it changes in place.
        model: The dense one.
        plan: The masks.
        graph: The dense model's trace.
    """

    small: nn.Module
    model: nn.Module
    plan: MaskPlan
    graph: Graph


def _sweep(masked: Masked, fit: Calibration, *, name: str) -> None:
    refit(name, masked.small, masked.graph, fit)


def _batchnorm(masked: Masked, fit: Calibration) -> None:
    if batch_norms(masked.small):
        reestimate(masked.small, fit)


def _surgeon(masked: Masked, fit: Calibration) -> None:
    surgeon(masked.small, masked.model, masked.plan, fit)


REPAIRS: Mapping[str, Callable[[Masked, Calibration], None]] = MappingProxyType(
    {name: partial(_sweep, name=name) for name in ("variance", "channelwise", "layerwise", "reconstruct")}
    | {"batchnorm": _batchnorm, "surgeon": _surgeon}
)
"""What can be done to every allocation alike. ``channelwise`` is plain variance matching of each output,
``variance`` the same with adaptive shrinkage (ASR), ``layerwise`` one factor a layer; ``surgeon`` updates
linear layers only."""
