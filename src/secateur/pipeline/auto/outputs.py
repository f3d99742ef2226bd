"""Measure how much the errors of each group change the model's outputs, by one pass with gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocators import RepairAware
from secateur.calibration import Batch, Calibration
from secateur.calibration.subset import take_share
from secateur.errors import CalibrationError, ScoreError
from secateur.measure.evaluate import floats_of
from secateur.pipeline.auto.depth import FARTHEST
from secateur.signals import Scores, score
from secateur.signals.loss import LossFn

if TYPE_CHECKING:
    from secateur.targets.lowrank.graph import RankGraph

SAMPLES = 32
"""About so many samples are looked at."""


def weighted_by_outputs(
    rule: RepairAware, graph: RankGraph, data: Calibration, scores: Scores, *, seed: int = 0
) -> RepairAware:
    r"""Give a rule factors that say how much an error of each group changes the model's outputs.

    Errors of ``reconstruction`` are shares of what a layer's outputs go into. An error of 10 % in the queries
    changes less than one of 10 % in the residual stream. With h_i the value of a unit, :math:`f` the outputs
    and v random signs,

    .. math:: F_i = E \Bigl( \sum h_i \, \frac{\partial v^\top f}{\partial h_i} \Bigr)^2

    is, to first order, how much the outputs change if unit i is gone. The factor of a group is the sum of F
    over the sum of errors: over the weaker half of a layer's directions, whose errors add up, and over all
    units of another group. It is one number a group, so a few samples will do. The mean of all logarithms
    is 0.

    Source: ours. F is the diagonal of the Gauss-Newton matrix of the squared distance, as Hutchinson (1990)
    estimates it.

    Args:
        rule: The rule.
        graph: The trace.
        data: What is read: a part of it.
        scores: Of the rule's signal.
        seed: For the signs.

    Returns:
        The rule with factors: those that it had times what was measured. The rule as it was where outputs
        have no gradient.
    """
    some = take_share(data, SAMPLES / max(1, data.samples()), whole=graph.static_batch is not None)
    try:
        found = score(graph, some, "fisher", loss_fn=_projected(some, seed), seed=seed, progress=False)
    except (CalibrationError, ScoreError):
        return rule
    (errors,) = (scores[name] for name in scores.values if name == "reconstruction")
    logarithms: dict[str, float] = {}
    for group in graph.groups:
        changes, lost = found["fisher"][group.name], errors[group.name]
        ratio = _ratio(changes, lost, directions=group.name in graph.uncorrelated)
        if 0 < ratio < math.inf:
            logarithms[group.name] = math.log(ratio)
    if not logarithms:
        return rule
    middle = float(np.median([*logarithms.values()]))
    limit = math.log(FARTHEST)
    clipped = {name: min(max(value - middle, -limit), limit) for name, value in logarithms.items()}
    mean = sum(clipped.values()) / len(clipped)
    factors = {name: rule.factors.get(name, 1.0) * math.exp(v - mean) for name, v in clipped.items()}
    return replace(rule, factors={**rule.factors, **factors})


def _ratio(changes: NDArray[np.float64], errors: NDArray[np.float64], *, directions: bool) -> float:
    """What the outputs change for an error.

    Args:
        changes: F of each unit.
        errors: The error after each unit and all cheaper ones are gone.
        directions: Whether the last unit stands for several, and has none of these.
    """
    if not directions:
        return float(changes.sum()) / (float(errors.max()) or math.inf)
    order = np.argsort(errors, kind="stable")
    added = np.diff(errors[order], prepend=0.0)
    weak = order != len(errors) - 1
    weak[1 + len(errors) // 2 :] = False
    return float(changes[order[weak]].sum()) / (float(added[weak].sum()) or math.inf)


def _projected(data: Calibration, seed: int) -> LossFn:
    """The sum of a sample's outputs, each with a random sign; the mean over the samples."""
    calls = itertools.count()

    def loss(model: Any, raw: Any) -> Tensor:
        batch = Batch.of(raw, 0, data.reading)
        generator = torch.Generator().manual_seed(seed + next(calls))
        total = torch.zeros(())
        for output in floats_of(batch.run(model), batch):
            signs = torch.randint(2, output.shape, generator=generator, dtype=torch.int8)
            total = total.to(output) + (output * (2 * signs - 1).to(output)).sum()
        return total / batch.size

    return loss
