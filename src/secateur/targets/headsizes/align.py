"""Another basis for each attention head, in which its last dimensions matter least. The model stays equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration, seeded
from secateur.common.models import named_tensors, unwrap
from secateur.errors import CalibrationError, SettingError
from secateur.graph.graph import Graph
from secateur.signals.program import CapturedModel
from secateur.targets.headsizes.find import Finder, Match, Side, Value
from secateur.targets.units.compare import double_copy, relative_difference, run_doubled
from secateur.targets.units.copying import duplicate
from secateur.targets.units.tensors import tensor_called

DAMPING = 1e-6
"""Share of the mean variance that each dimension gets beside its own, so that all can be inverted."""

TOLERANCE = 1e-9
"""Largest relative difference in float64 between the aligned model and the model."""

M = TypeVar("M", bound=nn.Module)


def align_heads(model: M, graph: Graph, calibration: Any, *, progress: bool = True) -> tuple[M, int]:
    r"""Copy a model with another basis in each attention head, whose last dimensions matter least.

    The outputs stay the same. So what removes the last dimensions of all heads of a layer removes from each
    head those that matter least to it, which no choice of the given dimensions does.

    Queries and keys: the logits :math:`q^\top k` are those of :math:`q' = M q` and
    :math:`k' = M^{-\top} k`. With second moments :math:`C_q, C_k` over all positions and
    :math:`C_q^{1/2} C_k^{1/2} = U S V^\top`, take :math:`M = S^{1/2} U^\top C_q^{-1/2}`. Then the first r
    dimensions give the best logits of rank r, on average over all pairs of a query and a key.

    Values: a layer that reads the sums y of a head by :math:`W_h y` reads :math:`W_h M^{-1}` of
    :math:`M y`, with :math:`C_y^{1/2} W_h^\top W_h C_y^{1/2} = V \Lambda V^\top` and
    :math:`M = c \Lambda^{1/4} V^\top C_y^{-1/2}`, where the number c leaves the mean square of y. Then the
    first r dimensions give the best outputs of rank r. Heads that share keys or values share M, from their
    summed moments.

    Where something else stands between a layer and the product, such as a rotary embedding or a norm, the
    basis stays as it is; so it does where a weight is used twice, or a product is written as an einsum.
    Padded positions count like others. The result is compared with the model in float64, on the traced
    inputs; if their outputs differ, because something else reads queries, keys or values, nothing changes.

    Source: the truncated singular value decomposition in the metric of the data, as in ASVD-like methods
    (Yuan et al. 2023, arXiv 2312.05821; SVD-LLM, arXiv 2403.07378), here for products of two activations.

    Args:
        model: The dense model; it is left as it was.
        graph: Its trace, with granularity ``head_size``.
        calibration: Anything that `Calibration.of` takes. Labels are not read.
        progress: Show a progress bar on a terminal.

    Returns:
        The new model, and how many products of queries with keys and sums of values have a new basis. If
        none has, the model itself, and 0.

    Raises:
        SettingError: `model` is no module, or `graph` no trace of head sizes, or one of another model.
        CalibrationError: There is no data, or moments are not finite.
    """
    model = cast("M", unwrap(model))
    if getattr(graph, "granularity", None) != "unit" or not graph.head_sizes:
        raise SettingError(
            f"align_heads(graph={short(graph)}): expected a trace of head sizes. Pass "
            "sc.trace(model, inputs, granularity='head_size')."
        )
    if graph.folded:  # computed weights have no rows to turn
        return model, 0
    finder = Finder(graph)
    matches, values = list(finder.matches()), list(finder.values())
    if not matches and not values:
        return model, 0
    _check_sizes(model, graph)
    moments = _moments(graph, calibration, matches, values, progress=progress)
    double = double_copy(model)
    with torch.no_grad():
        for match in matches:
            _turn_match(double, match, *moments[match])
        for value in values:
            _turn_value(double, value, *moments[value])
    args, kwargs = graph.captured_inputs()
    wanted = run_doubled(double_copy(model), args, kwargs)
    if not relative_difference(run_doubled(double, args, kwargs), wanted) <= TOLERANCE:
        return model, 0
    aligned = duplicate(model)
    sides = [side for match in matches for side in (match.query, match.key)]
    sides += [value.value for value in values]
    changed = {name for side in sides for name in side.tensors} | {value.tensor for value in values}
    with torch.no_grad():
        for name in changed:
            tensor_called(aligned, name).copy_(tensor_called(double, name))
    return aligned, len(matches) + len(values)


def _check_sizes(model: nn.Module, graph: Graph) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    traced = named_tensors(graph.programs.model or model)
    for name, tensor in traced.items():
        if found.get(name) != tuple(tensor.shape):
            raise SettingError(
                f"align_heads: expected the model that was traced, with {name} of {list(tensor.shape)}, got "
                f"{found.get(name) or 'none'}. Pass that model, or trace this one."
            )


Moments = tuple[Tensor, ...]
"""Of queries and of keys, or of sums of values: second moments by head. float64 [heads, size, size] each"""


def _moments(
    graph: Graph, calibration: Any, matches: list[Match], values: list[Value], *, progress: bool
) -> Mapping[Match | Value, Moments]:
    """Sum second moments over the data, in one pass."""
    sums: dict[Match | Value, list[Tensor]] = {}
    watched: dict[str, list[Callable[[Tensor, Callable[[Any], Tensor]], None]]] = {}

    def add(key: Match | Value, *heads: Tensor) -> None:
        found = [each.mT @ each for each in heads]
        sums[key] = [a + b for a, b in zip(sums[key], found, strict=True)] if key in sums else found

    def watch_match(match: Match) -> Callable[[Tensor, Callable[[Any], Tensor]], None]:
        count = len(match.query.channels)

        def see(_: Tensor, read: Callable[[Any], Tensor]) -> None:
            add(match, *(side.heads(read(side.operand), count) for side in (match.query, match.key)))

        return see

    def watch_value(value: Value) -> Callable[[Tensor, Callable[[Any], Tensor]], None]:
        sums_of = Side(value.product, {}, value.columns)
        return lambda output, _: add(value, sums_of.heads(output, len(value.columns)))

    for match in matches:
        watched.setdefault(match.product.name, []).append(watch_match(match))
    for value in values:
        watched.setdefault(value.product.name, []).append(watch_value(value))

    def show(name: str, value: Tensor, read: Callable[[Any], Tensor]) -> None:
        for see in watched[name]:
            see(value, read)

    captured = CapturedModel(graph.programs)
    captured.watch(watched, show)
    with seeded(0), torch.no_grad():
        data = Calibration.of(calibration, model=graph.programs.model).to(graph.device)
        for batch in data.batches("Aligning heads", progress):
            batch.run(captured)
    for key, found in sums.items():
        if not all(bool(torch.isfinite(each).all()) for each in found):
            raise CalibrationError(
                f"align_heads: expected finite activations at {key.product.name}, got NaN or infinity. "
                "Check the weights and the data."
            )
    return {key: tuple(found) for key, found in sums.items()}


def _root(moments: Tensor) -> Tensor:
    """Return the symmetric root of a matrix, with some damping. [size, size]"""
    least = DAMPING * (float(moments.diagonal().mean()) or 1.0)
    values, vectors = torch.linalg.eigh(moments)
    root: Tensor = vectors * (values.clamp_min(0) + least).sqrt() @ vectors.mT
    return root


def _turn_match(model: nn.Module, match: Match, queries: Tensor, keys: Tensor) -> None:
    """Give queries and keys their new basis, in place."""
    shared = len(match.query.channels) // len(match.key.channels)
    kinds = match.key.kinds.repeat_interleave(shared)
    for kind in kinds.unique().tolist():
        heads = [h for h, k in enumerate(kinds.tolist()) if k == kind]
        query, key = _root(queries[heads].sum(0)), _root(keys[heads].sum(0))
        left, size, _ = torch.linalg.svd(query @ key)
        size = size.clamp_min(size[0] * DAMPING).sqrt()
        turn = size[:, None] * torch.linalg.solve(query, left).mT
        for channels in match.query.channels[heads].unique(dim=0):
            _turn(model, match.query.tensors, channels, turn)
        _turn(model, match.key.tensors, match.key.channels[kind], torch.linalg.inv(turn).mT)


def _turn_value(model: nn.Module, value: Value, moments: Tensor) -> None:
    """Give values their new basis, in place, and turn it back in the layer that reads their sums."""
    shared = len(value.columns) // len(value.value.channels)
    kinds = value.value.kinds.repeat_interleave(shared)
    weight = tensor_called(model, value.tensor)
    for kind in kinds.unique().tolist():
        heads = [h for h, k in enumerate(kinds.tolist()) if k == kind]
        root = _root(moments[heads].sum(0))
        reads = weight.index_select(value.axis, value.columns[heads].flatten().to(weight.device))
        reads = reads.movedim(value.axis, 0).reshape(len(heads), len(root), -1)
        size, vectors = torch.linalg.eigh(root @ (reads @ reads.mT).sum(0) @ root)
        size, vectors = size.flip(0).clamp_min(float(size[-1]) * DAMPING**2 or 1.0), vectors.flip(1)
        size = size.sqrt() * (root.square().sum() / size.sqrt().sum())  # values stay as large as they were
        turn = size.sqrt()[:, None] * torch.linalg.solve(root, vectors).mT
        _turn(model, value.value.tensors, value.value.channels[kind], turn)
        for columns in value.columns[heads]:
            _turn(model, {value.tensor: value.axis}, columns, torch.linalg.inv(turn).mT)


def _turn(model: nn.Module, tensors: Mapping[str, int], places: Tensor, turn: Tensor) -> None:
    """Multiply positions along an axis of tensors by a matrix, in place."""
    for name, axis in tensors.items():
        tensor = tensor_called(model, name)
        own = places.to(tensor.device)
        rows = tensor.index_select(axis, own).movedim(axis, 0)
        turned = turn.to(tensor) @ rows.reshape(len(rows), -1)
        tensor.index_copy_(axis, own, turned.reshape(rows.shape).movedim(0, axis))
