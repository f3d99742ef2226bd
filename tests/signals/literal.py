"""Signals as their formulas say, by plain loops in float64, from the original model and its modules."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.graph.groups import Group
from secateur.signals.combine import Combine

Data = list[tuple[Tensor, Tensor]]

SHOWN = {
    "plain": {"0.0.weight": "0.2", "2.weight": "3", "4.0.weight": "4.2"},
    "residual": {
        "stem.0.weight": "stem.2",
        "inner1.0.weight": "inner1.2",
        "outer1.weight": "norm1",
        "inner2.0.weight": "inner2.2",
        "outer2.weight": "norm2",
        "project.weight": "project",
    },
    "mlp": {"0.weight": "1", "3.weight": "5", "6.weight": "7"},
    "flatten_to_linear": {"0.weight": "1", "3.weight": "4", "6.weight": "7"},
    "conv1d": {"0.weight": "2", "3.weight": "4", "7.weight": "9"},
    "conv3d": {"0.weight": "2", "4.weight": "5"},
    "gated": {"first.weight": "first", "second.weight": "second"},
}
"""For some topologies: the weight of each producing layer, and the module its activation comes out of."""


def members(group: Group, name: str) -> list[tuple[str, int, int]]:
    """Where the group's units show: module, channel, unit."""
    found = []
    for piece in group.of_role("produce"):
        if piece.tensor in SHOWN[name]:
            for position, unit in zip(piece.position.tolist(), piece.unit.tolist(), strict=True):
                found.append((SHOWN[name][piece.tensor], position, unit))
    return found


def watched(model: nn.Module, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the model, and what its shown modules computed last, with their gradients kept."""
    model = copy.deepcopy(model).eval()
    found: dict[str, Tensor] = {}

    def keep(module: str, out: Tensor) -> None:
        found[module] = out
        if out.requires_grad:
            out.retain_grad()

    for path in SHOWN[name].values():
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, path=path: keep(path, out))
    return model, found


def channel(value: Tensor, index: int) -> Tensor:
    """One channel's map, for one sample: [1, channels, ...]."""
    return value[0, index].double()


def join(numbers: list[list[float]], how: Combine) -> NDArray[np.float64]:
    """One number a unit, from one number a member."""
    rule: dict[str, Callable[[list[float]], float]] = {"sum": sum, "mean": np.mean, "max": max}
    return np.array([rule[how](of_unit) for of_unit in numbers])


def observed(
    model: nn.Module, name: str, group: Group, data: Data, measure: Callable[[Tensor], float], how: Combine
) -> NDArray[np.float64]:
    """The mean over samples of `measure` of each member's map, combined."""
    model, found = watched(model, name)
    where = members(group, name)
    totals = [0.0] * len(where)
    samples = [x for inputs, _ in data for x in inputs.split(1)]
    for sample in samples:
        with torch.no_grad():
            model(sample)
        for k, (module, position, _) in enumerate(where):
            totals[k] += float(measure(channel(found[module], position)))
    of_units: list[list[float]] = [[] for _ in range(group.size)]
    for total, (_, _, unit) in zip(totals, where, strict=True):
        of_units[unit].append(total / len(samples))
    return join(of_units, how)


def derivatives(model: nn.Module, name: str, group: Group, data: Data) -> NDArray[np.float64]:
    """Of each sample's loss, with respect to a factor on all that a unit shows. [samples, units]"""
    model, found = watched(model, name)
    rows = []
    for inputs, labels in data:
        for sample, label in zip(inputs.split(1), labels.split(1), strict=True):
            F.cross_entropy(model(sample), label).backward()
            row = np.zeros(group.size)
            for module, position, unit in members(group, name):
                gradient = found[module].grad
                assert gradient is not None
                shown = found[module].detach()
                row[unit] += float((channel(shown, position) * channel(gradient, position)).sum())
            rows.append(row)
    return np.array(rows)


def snip(model: nn.Module, group: Group, data: Data) -> NDArray[np.float64]:
    model = copy.deepcopy(model).eval().requires_grad_(True)
    inputs, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    F.cross_entropy(model(inputs), labels).backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    score = np.zeros(group.size)
    for piece in group.of_role("produce"):
        weight = parameters[piece.tensor]
        for position, unit in zip(piece.position.tolist(), piece.unit.tolist(), strict=True):
            w = weight.detach().select(piece.axis, position)
            g = weight.grad.select(piece.axis, position)
            score[unit] += float((w * g).abs().sum())
    return score


def rows_of(model: nn.Module, group: Group, tensor: str, axis: int) -> dict[int, NDArray[np.float64]]:
    """All numbers that a tensor holds of each unit."""
    values = model.state_dict()[tensor].double()
    rows: dict[int, list[NDArray[np.float64]]] = {}
    for piece in group.slices:
        if piece.tensor == tensor and piece.axis == axis:
            for position, unit in zip(piece.position.tolist(), piece.unit.tolist(), strict=True):
                rows.setdefault(unit, []).append(values.select(axis, position).flatten().numpy())
    return {unit: np.concatenate(parts) for unit, parts in rows.items()}


def relative(numbers: dict[int, float]) -> dict[int, float]:
    mean = sum(numbers.values()) / len(numbers)
    return {unit: number / mean for unit, number in numbers.items()}


def of_tensors(
    model: nn.Module,
    group: Group,
    tensors: list[tuple[str, int]],
    measure: Callable[[dict[int, NDArray[np.float64]]], dict[int, float]],
    how: Combine,
) -> NDArray[np.float64]:
    """What `measure` makes of each tensor's rows, over its mean, combined."""
    of_units: list[list[float]] = [[] for _ in range(group.size)]
    for tensor, axis in tensors:
        for unit, number in relative(measure(rows_of(model, group, tensor, axis))).items():
            of_units[unit].append(number)
    return join(of_units, how)
