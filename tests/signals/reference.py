"""The scores as their formulas say, by plain loops in float64, from the original model."""

from __future__ import annotations

import copy
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.graph.graph import Graph
from secateur.graph.groups import Group
from secateur.signals.units.wasserstein import directions

Data = list[tuple[Tensor, Tensor]]


def outputs(model: nn.Module, group: Group, inputs: Tensor) -> dict[str, Tensor]:
    """What each layer that produces the group computes, by the name of its weight."""
    model = copy.deepcopy(model).eval()
    weights = [s.tensor for s in group.of_role("produce") if s.tensor.endswith("weight")]
    found: dict[str, Tensor] = {}
    for name in weights:
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out.detach()))
    with torch.no_grad():
        model(inputs)
    return found


def sliced_distance(a: Tensor, b: Tensor, projections: int, seed: int) -> float:
    """Mean over random directions of SciPy's distance between two classes' maps [n, map]."""
    theta = directions(a.shape[1], projections, seed)
    distances = []
    for p in range(theta.shape[1]):
        left, right = (a.double() @ theta[:, p]).numpy(), (b.double() @ theta[:, p]).numpy()
        distances.append(wasserstein_distance(left, right))
    return float(np.mean(distances))


def wasserstein(
    model: nn.Module, group: Group, data: Data, projections: int = 16, per_class: int = 32, seed: int = 0
) -> NDArray[np.float64]:
    inputs, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    members = {c: (labels == c).nonzero()[:per_class, 0] for c in sorted(set(labels.tolist()))}
    found = outputs(model, group, inputs)
    score = np.zeros(group.size)
    for piece in group.of_role("produce"):
        if piece.tensor not in found:
            continue
        out = found[piece.tensor]
        layer = model.get_submodule(piece.tensor.rpartition(".")[0])
        axis = -1 if isinstance(layer, nn.Linear) else 1
        for position, unit in zip(piece.position.tolist(), piece.unit.tolist(), strict=True):
            maps = out.select(axis, position).reshape(len(out), -1)
            for a, b in combinations(members, 2):
                distance = sliced_distance(maps[members[a]], maps[members[b]], projections, seed)
                score[unit] = max(score[unit], distance)
    return score


def taylor(model: nn.Module, graph: Graph, group: Group, data: Data) -> NDArray[np.float64]:
    model = copy.deepcopy(model).eval().requires_grad_(True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    score = np.zeros(group.size)
    samples = 0
    for inputs, labels in data:
        model.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        samples += len(labels)
        for piece in group.of_role("produce"):
            weight = parameters[piece.tensor]
            for position, unit in zip(piece.position.tolist(), piece.unit.tolist(), strict=True):
                w = weight.detach().select(piece.axis, position)
                g = weight.grad.select(piece.axis, position)
                score[unit] += len(labels) * float((w.double() * g.double()).sum())
    return np.abs(score) / samples
