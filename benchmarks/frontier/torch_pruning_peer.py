"""Torch-Pruning: its criteria, one threshold for all layers or one ratio for each.

It takes a ratio of channels; the one that gives the MACs asked for is bisected. Scope ``all`` is as it comes:
only the classifier is left alone. Scope ``inner`` also leaves alone what adds to a stream, and attention, for
networks that it breaks otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from benchmarks.frontier.bisection import Found, UnreachedError, nearest_below
from benchmarks.frontier.entrant import Entrant, Made
from benchmarks.frontier.refreshed import with_batch_norms
from benchmarks.frontier.workload import Draw, Workload, macs

SIDE = "Torch-Pruning"
STEPS, LAST_RATIO = 200, 0.9
SINGLE = 100
"""Images whose gradients the Hessian criterion gets, one by one."""


@dataclass(frozen=True)
class Criterion:
    """How channels are compared.

    Attributes:
        make: The peer's own object.
        gradients: ``batches``: of the loss, summed over batches; ``images``: of one image after another, each
            handed to the peer; None: it reads weights alone.
        random: It draws.
        steps: Also run in many small steps, comparing anew in each.
    """

    make: Callable[[], Any]
    gradients: str | None = None
    random: bool = False
    steps: bool = False

    @property
    def reads_data(self) -> bool:
        """Whether another draw gives another network."""
        return self.gradients is not None or self.random


CRITERIA = {
    "magnitude L1": Criterion(lambda: tp.importance.GroupMagnitudeImportance(p=1), steps=True),
    "magnitude L2": Criterion(lambda: tp.importance.GroupMagnitudeImportance(p=2), steps=True),
    "batch-norm scale": Criterion(tp.importance.BNScaleImportance, steps=True),
    "LAMP": Criterion(lambda: tp.importance.LAMPImportance(p=2), steps=True),
    "FPGM": Criterion(tp.importance.FPGMImportance, steps=True),
    "Taylor": Criterion(tp.importance.GroupTaylorImportance, "batches"),
    "Hessian": Criterion(tp.importance.GroupHessianImportance, "images"),
    "random": Criterion(tp.importance.RandomImportance, random=True),
}


def left_alone(workload: Workload, scope: str) -> frozenset[str]:
    """The modules whose outputs keep their width.

    Scope ``all``: those that give the network's outputs. Scope ``inner``: also those that add to a stream or
    are inexact or frozen, and those whose units are no single channels, as heads are.
    """
    if scope == "all":
        frozen = (f for f in workload.graph.frozen if f.reason == "model output" and f.axis == 0)
        return frozenset(f.tensor.rpartition(".")[0] for f in frozen)
    layers = {n for n, m in workload.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    free: set[str] = set()
    for group in workload.graph.groups:
        makers = workload.makers(group)
        if len(makers) == 1 and set(makers.values()) == {group.size}:
            free |= {piece.tensor.rpartition(".")[0] for piece in group.of_role("produce")}
    return frozenset(layers - free)


@dataclass(eq=False)
class TorchPruning:
    """One criterion, scope and way to rank."""

    workload: Workload
    title: str
    criterion: Criterion
    everywhere: bool
    scope: str
    stepwise: bool = False
    side: str = SIDE
    _found: dict[tuple[int | None, float], Found[nn.Module]] = field(default_factory=dict)
    _descent: dict[int | None, list[Found[nn.Module]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Criterion, ranking, steps, scope."""
        ranking = "global" if self.everywhere else "uniform"
        parts = [self.title, ranking, *([f"{STEPS} steps"] * self.stepwise), self.scope]
        return ", ".join(parts)

    def made(self, draw: Draw, point: float) -> Made:
        """As it comes, and with batch norms re-estimated on the draw."""
        key = (draw.seed if self.criterion.reads_data else None, point)
        if key not in self._found:
            self._found[key] = (self._stepping if self.stepwise else self._bisecting)(draw, point)
        found = self._found[key]
        stages, seconds = with_batch_norms(found.value, draw)
        return Made(stages, {"prune": found.seconds, **seconds}, {"ratio": found.setting})

    def _bisecting(self, draw: Draw, point: float) -> Found[nn.Module]:
        start = process_time()
        primed = self._primed(draw)
        priming = process_time() - start

        def make(ratio: float) -> nn.Module:
            model, pruner = self._pruner(primed, draw, ratio, 1)
            pruner.step()
            return _done(model)

        found = nearest_below(make, self._share, point)
        return Found(found.setting, found.cost, found.seconds + priming, found.value)

    def _stepping(self, draw: Draw, point: float) -> Found[nn.Module]:
        """One descent serves every point."""
        key = draw.seed if self.criterion.reads_data else None
        if key not in self._descent:
            self._descent[key] = list(self._steps(draw))
        within = [f for f in self._descent[key] if f.cost <= point]
        if not within:
            smallest = min(f.cost for f in self._descent[key])
            raise UnreachedError(f"expected at most {point:.3f} of the MACs, got no less than {smallest:.3f}")
        return max(within, key=lambda f: f.cost)

    def _steps(self, draw: Draw) -> Iterator[Found[nn.Module]]:
        start = process_time()
        model, pruner = self._pruner(self._primed(draw), draw, LAST_RATIO, STEPS)
        for step in range(STEPS):
            pruner.step()
            reached = _done(copy.deepcopy(model))
            ratio = LAST_RATIO * (step + 1) / STEPS
            yield Found(ratio, self._share(reached), process_time() - start, reached)

    def _share(self, model: nn.Module) -> float:
        return macs(model, self.workload.example) / self.workload.dense_macs

    def _primed(self, draw: Draw) -> tuple[nn.Module, Any]:
        """A copy of the dense network with the gradients that the criterion reads, and the criterion."""
        model, importance = copy.deepcopy(self.workload.model), self.criterion.make()
        model.zero_grad()
        if self.criterion.gradients == "batches":
            for images, labels in draw.labelled:
                F.cross_entropy(model(images), labels).backward()
        elif self.criterion.gradients == "images":
            images = torch.cat([x for x, _ in draw.labelled])[:SINGLE]
            labels = torch.cat([y for _, y in draw.labelled])[:SINGLE]
            importance.zero_grad()
            for image, label in zip(images.split(1), labels.split(1), strict=True):
                model.zero_grad()
                F.cross_entropy(model(image), label).backward()
                importance.accumulate_grad(model)
        return model, importance

    def _pruner(
        self, primed: tuple[nn.Module, Any], draw: Draw, ratio: float, steps: int
    ) -> tuple[nn.Module, Any]:
        model, importance = copy.deepcopy(primed)  # together: a criterion can hold on to parameters
        for mine, theirs in zip(model.parameters(), primed[0].parameters(), strict=True):
            mine.grad = None if theirs.grad is None else theirs.grad.clone()
        torch.manual_seed(draw.seed)
        alone = left_alone(self.workload, self.scope)
        pruner = tp.pruner.BasePruner(
            model,
            self.workload.example,
            importance=importance,
            global_pruning=self.everywhere,
            pruning_ratio=ratio,
            iterative_steps=steps,
            ignored_layers=[module for name, module in model.named_modules() if name in alone],
            in_channel_groups={},  # its defaults are shared between calls
            out_channel_groups={},
            num_heads={},
        )
        return model, pruner


def _done(model: nn.Module) -> nn.Module:
    """In eval mode, without gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


def entrants(workload: Workload) -> list[Entrant]:
    """Every criterion, ranking and scope; one scope where both are the same."""
    same = left_alone(workload, "all") == left_alone(workload, "inner")
    found: list[Entrant] = []
    for scope in ("all",) if same else ("all", "inner"):
        for title, criterion in CRITERIA.items():
            for everywhere in (True, False):
                found.append(TorchPruning(workload, title, criterion, everywhere, scope))
            if criterion.steps:
                found.append(TorchPruning(workload, title, criterion, True, scope, stepwise=True))
    return found
