"""Small networks, pruned, and data for them, for tests of repair."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.repairs.sweep import sweep
from tests.helpers.models import TOPOLOGIES
from tests.helpers.traces import applier, dense, traced
from tests.targets.units.plans import plan_of, random_plan

Data = list[tuple[Tensor, ...]]


def inputs(*shape: int, batches: int = 4, samples: int = 16, seed: int = 0) -> Data:
    """Standard normal batches in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(samples, *shape, generator=generator, dtype=torch.float64),) for _ in range(batches)]


def topology_data(name: str, batches: int = 4, samples: int = 8) -> list[Any]:
    """Batches for one of the topologies, in float64."""
    found: list[Any] = []
    for seed in range(batches):
        torch.manual_seed(seed)
        given = TOPOLOGIES[name].inputs(samples, torch.float64)
        found.append(given if isinstance(given, dict) else (given,))
    return found


def pruned(
    net: nn.Module, example: Any, removed: dict[str, Sequence[int]] | None = None, form: str = "module"
) -> tuple[sc.Graph, nn.Module]:
    """A network without some units of its groups; 30 % of each, at random, if none are named."""
    graph = sc.trace(net, example)
    if removed is None:
        plan = random_plan(graph, 0.3)
    else:
        keep = {g.name: np.ones(g.size, dtype=bool) for g in graph.groups if g.name in removed}
        for name, units in removed.items():
            keep[name][list(units)] = False
        plan = plan_of(graph, keep)
    return graph, sc.apply(net, plan, form, graph=graph)  # type: ignore[arg-type]


def swept(
    method: str, net: nn.Module, graph: sc.Graph, small: nn.Module, data: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A repaired copy, and what the sweep reports."""
    copy = sc.repair(small, net, data, None)
    return copy, sweep(method, copy, graph, sc.Calibration.of(data))


def distance(a: nn.Module, b: nn.Module, data: Any) -> float:
    """Squared distance of the outputs, relative to those of `b`."""
    return sc.evaluate(a, data, dense=b).loss


@functools.cache
def topology(name: str, form: str) -> tuple[nn.Module, sc.Graph, nn.Module]:
    """A topology, its trace, and what is left of it in some form."""
    graph = traced(name)
    return dense(name), graph, applier(name)(random_plan(graph, 0.3), form)  # type: ignore[arg-type]
