"""Find the sparsity above which repair no longer recovers the accuracy, for each allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from secateur.allocators import Budget, resolve
from secateur.allocators.registry import Allocates
from secateur.calibration import Calibration
from secateur.errors import UnreachableBudgetError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.measure.evaluate import Evaluation, evaluate
from secateur.repairs.batchnorm import batch_norms, reestimate
from secateur.repairs.sweep import sweep as refit
from secateur.signals import score
from secateur.targets.weights.apply import apply
from secateur.targets.weights.distortion import with_curves
from secateur.targets.weights.plan import MaskPlan
from secateur.targets.weights.surgeon import surgeon
from secateur.targets.weights.weights import trace as weights_of


@dataclass(frozen=True)
class Point:
    """The result of one allocator at one sparsity, after repair.

    Attributes:
        rule: The allocator's name.
        sparsity: The requested fraction of zero weights.
        loss: Loss of the repaired model.
        accuracy: Top-1 accuracy of the repaired model, None if it is not defined.
    """

    rule: str
    sparsity: float
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Transition:
    """Results of `sweep` for several allocators and sparsities.

    Attributes:
        dense: The dense model's loss and accuracy.
        points: One point for each allocator and each sparsity that it can reach.
        share: A model is recovered if it has at least this share of the dense accuracy.
    """

    dense: Evaluation
    points: tuple[Point, ...]
    share: float

    def recovered(self, point: Point) -> bool:
        """Whether accuracy is at least share × dense. Without accuracy: loss is at most dense / share."""
        if self.dense.accuracy is not None and point.accuracy is not None:
            return point.accuracy >= self.share * self.dense.accuracy
        return point.loss * self.share <= self.dense.loss

    def last(self, rule: str) -> float | None:
        """The highest sparsity up to which all points of a rule are recovered; None if the first is not."""
        found = None
        for point in sorted((p for p in self.points if p.rule == rule), key=lambda p: p.sparsity):
            if not self.recovered(point):
                break
            found = point.sparsity
        return found


def sweep(
    model: nn.Module,
    fit: Calibration,
    held_out: Calibration,
    rules: Mapping[str, str | Allocates],
    sparsities: Sequence[float],
    *,
    criterion: str = "magnitude",
    repair: str = "variance",
    share: float = 0.95,
    seed: int = 0,
) -> Transition:
    """Prune with each allocator at each sparsity, repair all models in the same way, and measure them.

    The repaired model is always the one measured, even if repair made it worse. `sc.repair` would undo that.

    Args:
        model: The dense model. It is not changed.
        fit: Data for scores, curves and repairs.
        held_out: Labelled data to measure on.
        rules: Allocators, as names or instances, by the name to show.
        sparsities: Fractions of the weights to remove.
        criterion: Scores the weights of each layer: a name from `secateur.signals.weights.score.CRITERIA`.
        repair: A name from `REPAIRS`.
        share: A model is recovered if it has at least this share of the dense accuracy.
        seed: Seed for all random choices.
    """
    example = fit.first()
    graph = trace(model, example.inputs, allow_inexact=True)
    points = []
    for name, sparsity, plan in allocations(model, fit, rules, sparsities, criterion=criterion, seed=seed):
        small = apply(model, plan, graph)
        REPAIRS[repair](Masked(small, model, plan, graph), fit)
        found = evaluate(small, held_out)
        points.append(Point(name, sparsity, found.loss, found.accuracy))
    return Transition(evaluate(model, held_out), tuple(points), share)


def allocations(
    model: nn.Module,
    fit: Calibration,
    rules: Mapping[str, str | Allocates],
    sparsities: Sequence[float],
    *,
    criterion: str = "magnitude",
    seed: int = 0,
) -> Iterator[tuple[str, float, MaskPlan]]:
    """Yield (allocator name, sparsity, masks) for each sparsity that an allocator can reach.

    The arguments are those of `sweep`.
    """
    weights = weights_of(model)
    scores = score(weights, fit, criterion, seed=seed)
    for name, given in rules.items():
        rule: Any = with_curves(_with_criterion(resolve(given), criterion), model, fit, scores)
        for sparsity in sparsities:
            try:
                plan = rule.allocate(weights, scores, Budget(sparsity=sparsity), seed=seed)
            except UnreachableBudgetError:
                continue
            yield name, sparsity, plan


def _with_criterion(rule: Any, criterion: str) -> Any:
    return rule if rule.signals == ("random",) else replace(rule, removal=criterion)


@dataclass(frozen=True, eq=False)
class Masked:
    """The arguments of a repair in `REPAIRS`.

    Attributes:
        small: The masked model. The repair changes it in place.
        model: The dense model.
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
"""Repairs for `sweep`, by name. ``channelwise`` matches the variance of each output. ``variance`` does so
with adaptive shrinkage (ASR). ``layerwise`` fits one factor for each layer. ``surgeon`` updates linear layers
only."""
