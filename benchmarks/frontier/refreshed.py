"""A peer's network as it comes, and with the running statistics of its batch norms measured again."""

from __future__ import annotations

import copy
from time import process_time

from torch import nn

import secateur as sc
from benchmarks.frontier.workload import Draw
from secateur.repairs.batchnorm import batch_norms, reestimate


def with_batch_norms(model: nn.Module, draw: Draw) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Stages ``pruned`` and, where there are batch norms, ``batchnorm``; the seconds of the second."""
    if not batch_norms(model):
        return {"pruned": model}, {}
    start = process_time()
    fresh = copy.deepcopy(model)
    reestimate(fresh, sc.Calibration.of(draw.unlabelled))
    return {"pruned": model, "batchnorm": fresh.eval()}, {"repair": process_time() - start}
