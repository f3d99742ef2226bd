"""network-pruner, the package of FAIR-Pruner's authors: its scores, tolerance and surgery, as they come.

It takes a tolerance; the one that gives the MACs asked for is bisected, so a budget above what the smallest
tolerance leaves is not reached more closely. It is called as its documentation does, with its own defaults.
Installed by hand: `pip install --no-deps network-pruner==2.16`; it has no licence, so nothing of it is here.
"""

from __future__ import annotations

import copy
import random
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.frontier.bisection import Found, nearest_below
from benchmarks.frontier.entrant import Entrant, Made
from benchmarks.frontier.refreshed import with_batch_norms
from benchmarks.frontier.workload import BATCH, Draw, Workload, macs

SIDE = "network-pruner"


class Images(TensorDataset):
    """The draw's images, with the attribute by which the peer learns the number of classes."""

    classes = tuple(range(10))


@dataclass(eq=False)
class NetworkPruner:
    """Its one rule."""

    workload: Workload
    name: str = "ToD"
    side: str = SIDE
    _metrics: dict[int, tuple[Any, float]] = field(default_factory=dict)
    _failure: Exception | None = None

    def made(self, draw: Draw, point: float) -> Made:
        """As it comes, and with batch norms re-estimated on the draw.

        Where its scoring fails once it is not tried again, since that takes minutes.
        """
        if self._failure is not None:
            raise self._failure
        if draw.seed not in self._metrics:
            try:
                self._metrics = {draw.seed: self._scored(draw)}
            except Exception as error:
                self._failure = error
                raise
        known = self._metrics[draw.seed]
        metrics, scoring = known
        found: Found[nn.Module] = nearest_below(
            lambda level: self._pruned(metrics, level),
            lambda model: macs(model, self.workload.example) / self.workload.dense_macs,
            point,
        )
        stages, seconds = with_batch_norms(found.value, draw)
        return Made(
            stages, {"score": scoring, "prune": found.seconds, **seconds}, {"tolerance": found.setting}
        )

    def _scored(self, draw: Draw) -> tuple[Any, float]:
        from Network_Pruner import FAIR_Pruner

        random.seed(draw.seed)
        np.random.seed(draw.seed)  # noqa: NPY002 (the state that the peer draws from)
        torch.manual_seed(draw.seed)
        images: Tensor = torch.cat([x for x, _ in draw.labelled])
        labels: Tensor = torch.cat([y for _, y in draw.labelled])
        start = process_time()
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            metrics = FAIR_Pruner.get_metrics(
                copy.deepcopy(self.workload.model),
                DataLoader(Images(images, labels), batch_size=BATCH),
                device=torch.device("cpu"),
                results_save_path=str(Path(folder) / "results"),
            )
        return metrics, process_time() - start

    def _pruned(self, metrics: Any, level: float) -> nn.Module:
        from Network_Pruner import FAIR_Pruner

        dense, example = copy.deepcopy(self.workload.model), self.workload.example
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            ratios = FAIR_Pruner.get_ratios(dense, metrics, ToD_level=level)
            skeleton = FAIR_Pruner.get_skeleton(dense, ratios, example)
            small, _ = FAIR_Pruner.prune(
                skeleton,
                dense,
                metrics,
                ratios,
                pruned_model_save_path=str(Path(folder) / "pruned"),
                example_inputs=example,
                device="cpu",
            )
        model: nn.Module = small.eval()
        return model


def entrants(workload: Workload) -> list[Entrant]:
    """The one there is."""
    return [NetworkPruner(workload)]
