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
"""About this many samples are read."""


def weighted_by_outputs(
    rule: RepairAware, graph: RankGraph, data: Calibration, scores: Scores, *, seed: int = 0
) -> RepairAware:
    r"""Give a rule factors that say how much an error of each group changes the model's outputs.

    Errors of ``reconstruction`` are relative to the value that a layer's outputs are added to. They say
    nothing about the model's outputs: an error of 10 % in the queries changes these less than an error of
    10 % in the residual stream. With h_i the value of unit i, :math:`f` the outputs and v random signs,

    .. math:: F_i = E \Bigl( \sum h_i \, \frac{\partial v^\top f}{\partial h_i} \Bigr)^2

    is, to first order, how much the outputs change if unit i is removed. The factor of a group is the sum of
    F divided by the sum of errors. For directions of a layer, the sums run over the weaker half, because
    their errors add up; for other groups they run over all units. As there is only one factor for each group,
    a few samples are enough. The mean of all logarithms of factors is 0.

    Source: ours. F is the diagonal of the Gauss-Newton matrix of the squared distance, as Hutchinson (1990)
    estimates it.

    Args:
        rule: The rule.
        graph: The trace.
        data: Calibration data, of which a small share is read.
        scores: Scores of the rule's signal.
        seed: Seed of the random signs.

    Returns:
        The rule, with its own factors times the measured ones. If the outputs have no gradient, the rule
        unchanged.
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
    """Return a group's factor: the sum of changes of the outputs, divided by the sum of errors.

    Args:
        changes: F of each unit.
        errors: For each unit, the error after this unit and all cheaper ones are removed.
        directions: Whether units are directions of a layer. The last unit then stands for all weaker
            directions together, and is left out.
    """
    if not directions:
        return float(changes.sum()) / (float(errors.max()) or math.inf)
    order = np.argsort(errors, kind="stable")
    added = np.diff(errors[order], prepend=0.0)
    weak = order != len(errors) - 1
    weak[1 + len(errors) // 2 :] = False
    return float(changes[order[weak]].sum()) / (float(added[weak].sum()) or math.inf)


def _projected(data: Calibration, seed: int) -> LossFn:
    """Return a loss: the mean over samples of the sum of all outputs, each with a random sign."""
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
