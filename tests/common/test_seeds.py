"""Whoever takes a seed takes the same ones, and refuses all others in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from secateur.common.seeds import LEAST, MOST
from secateur.config.read import read_run
from tests.helpers.hostile import GRAPH, NET, SCORES, SMALL

DATA = [(torch.randn(16, 4), torch.arange(16) % 2) for _ in range(4)]
QUIET: Any = {"progress": False}
CALLS: dict[str, Callable[[Any], Any]] = {
    "prune": lambda s: sc.prune(
        NET, DATA, sc.Budget(macs=0.6), "tod", seed=s, measure_latency=False, **QUIET
    ),
    "score": lambda s: sc.score(GRAPH, DATA, ("random", "taylor"), seed=s, **QUIET),
    "score without data": lambda s: sc.score(GRAPH, None, "random", seed=s),
    "allocate": lambda s: sc.Uniform(ratio=0.25).allocate(GRAPH, SCORES, seed=s),
    "repair": lambda s: sc.repair(SMALL, NET, DATA, "reconstruct", seed=s, **QUIET),
    "recover": lambda s: sc.recover(SMALL, NET, DATA, epochs=1, seed=s, **QUIET),
    "compare": lambda s: sc.compare(NET, DATA, rules=["tod"], budgets=[sc.Budget(macs=0.6)], seed=s, **QUIET),
    "calibration": lambda s: sc.Calibration.of(DATA, seed=s),
    "weights": lambda s: sc.score(sc.trace(NET, granularity="weight"), None, "random", seed=s),
}


@pytest.mark.parametrize("name", CALLS)
def test_seeds(name: str) -> None:
    for seed in (LEAST - 1, MOST + 1, 10**30, 1.5, "1", None, True, float("nan"), []):
        with pytest.raises(sc.SecateurError, match="seed: expected a whole number"):
            CALLS[name](seed)
    for seed in (LEAST, -1, MOST, np.int64(3)):
        CALLS[name](seed)


@pytest.mark.parametrize("text", [str(MOST + 1), "1e400", ".nan", "x"])
def test_of_the_command_line(text: str) -> None:
    with pytest.raises(sc.SecateurError, match="--set seed"):
        read_run(sets=[f"seed={text}"])
