"""Measure, layer by layer, how much pruning changes the outputs before and after repair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.allocators import Repairability
from secateur.allocators.distortion import GRID, Distortion, Moments
from secateur.allocators.ranking import ranks
from secateur.allocators.registry import Allocates
from secateur.calibration import Calibration, seeded
from secateur.common.models import device_of, evaluating, unwrap
from secateur.errors import ScoreError
from secateur.signals.scores import Scores
from secateur.signals.units.combination import name_of
from secateur.targets.weights.weights import Layer, layers_of, trace


def with_curves(
    rule: Allocates, model: nn.Module, data: Any, scores: Scores, *, progress: bool = False
) -> Allocates:
    """Measure the distortion curves for a `Repairability` rule that has none.

    Returns:
        The rule with its curves. Any other rule is returned unchanged.
    """
    if not isinstance(rule, Repairability) or rule.curves is not None:
        return rule
    return replace(rule, curves=distortions(model, data, scores[name_of(rule.removal)], progress=progress))


def distortions(
    model: nn.Module,
    calibration: Any,
    scores: Mapping[str, NDArray[np.float64]],
    *,
    grid: Sequence[float] = GRID,
    progress: bool = True,
) -> dict[str, Distortion]:
    """Measure how much each layer's outputs change at each sparsity, before and after variance matching.

    Each layer is pruned alone: its inputs are those of the dense model. At each sparsity the weights with the
    lowest scores are zero. One pass over the data measures all layers; in it, each layer runs once for every
    sparsity.

    Args:
        model: The dense model. It is not changed.
        calibration: Anything that `Calibration.of` takes. Labels are not read.
        scores: Scores of one criterion, by weight name: one entry of what `sc.score` returns. [group.size]
        grid: Sparsities, ascending, from 0 to 1.
        progress: Show a progress bar on a terminal.

    Returns:
        One curve for each weight, by its name in the state dict.

    Raises:
        ScoreError: A layer has no scores, or no data reach it.
        CalibrationError: There is no data.
    """
    model = unwrap(model)
    layers = layers_of(model)
    for group in trace(model).groups:
        if group.name not in scores or np.shape(scores[group.name]) != (group.size,):
            raise ScoreError(
                f"distortions: expected {group.size} scores of {group.name!r}. Score the model first."
            )
    data = Calibration.of(calibration, model=model).to(device_of(model))
    places = {name: torch.from_numpy(ranks(np.asarray(scores[name]))) for name in layers}
    sums: dict[str, Moments] = {}
    handles = []
    for name, found in layers.items():
        for layer in found:

            def see(
                module: nn.Module, args: Any, output: Tensor, name: str = name, layer: Layer = layer
            ) -> None:
                weights = _pruned(layer.weight.detach(), places[name], grid)
                z = (_rows(layer, _run(layer, args[0], weight)) for weight in weights)
                moments = Moments.of(_rows(layer, output), z)
                sums[name] = sums[name] + moments if name in sums else moments

            handles.append(layer.register_forward_hook(see))
    try:
        with seeded(0), evaluating(model), torch.no_grad():
            for batch in data.batches("Measuring repairability", progress):
                batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name in layers if name not in sums]
    if unseen:
        raise ScoreError(
            f"distortions: expected data at every layer, got none at {unseen[0]!r}. Use other data."
        )
    return {name: sums[name].distortion(grid) for name in layers}


def _pruned(weight: Tensor, place: Tensor, grid: Sequence[float]) -> Iterator[Tensor]:
    """Yield the weight at each sparsity, with its lowest-ranked entries at zero.

    Args:
        weight: The dense weight.
        place: Rank of each entry by score, 0 for the lowest. [weight.numel()]
        grid: Sparsities, each in [0, 1].
    """
    place = place.reshape(weight.shape).to(weight.device)
    for s in grid:
        yield torch.where(place >= round(s * weight.numel()), weight, 0)


def _run(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    found: Tensor = layer._conv_forward(x, weight, layer.bias)
    return found


def _rows(layer: Layer, y: Tensor) -> Tensor:
    """Reshape a layer's output to [samples × positions, outputs]."""
    if not isinstance(layer, nn.Linear):
        y = y.movedim(-layer.weight.ndim + 1, -1)
    return y.reshape(-1, y.shape[-1])
