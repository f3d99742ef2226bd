"""The residual stream of a transformer: which layers write it, which norms and layers read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.common.models import evaluating, named_tensors
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Slice
from secateur.targets.units.compare import double_copy, run_doubled


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor along which the stream lies.

    Attributes:
        tensor: Its name in the state dict.
        axis: The axis.
    """

    tensor: str
    axis: int


@dataclass(frozen=True)
class Norm:
    """A norm that reads the stream, and the layers that read the norm.

    Attributes:
        path: The module.
        weight: Name of its factors in the state dict.
        bias: Name of its bias; None if it has none.
        centres: Whether it subtracts the mean: a layer norm. Else it is an RMS norm.
        neutral: The weight with which it multiplies by one: 1, or 0 for norms that add one to it.
        readers: The layers' weights.
    """

    path: str
    weight: str
    bias: str | None
    centres: bool
    neutral: float
    readers: tuple[Axis, ...]


@dataclass(frozen=True)
class Stream:
    """A residual stream.

    Attributes:
        group: Its units in the trace.
        width: How many.
        writers: Weights and biases whose outputs are added to it.
        norms: All that reads it.
    """

    group: str
    width: int
    writers: tuple[Axis, ...]
    norms: tuple[Norm, ...]

    @property
    def centred(self) -> bool:
        """Whether its norms are layer norms."""
        return self.norms[0].centres


def find_stream(model: nn.Module, graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Stream:
    """The stream of a model, by what its trace and one forward pass show.

    Raises:
        SettingError: There is none, or something acts on it that a rotation would change.
    """
    group = _group(graph)
    tensors = named_tensors(model)
    writers = [_axis(s, group) for s in group.of_role("produce")]
    consumers = tuple(_axis(s, group) for s in group.of_role("consume"))
    scales: dict[str, list[str]] = {}
    for piece in group.of_role("scale"):
        axis = _axis(piece, group)
        if tensors[piece.tensor].ndim > 1:  # added to it, as positions are
            writers.append(axis)
        else:
            scales.setdefault(piece.tensor.rpartition(".")[0], []).append(piece.tensor)
    reading = _readers(model, list(scales), consumers, args, kwargs)
    norms = tuple(
        _norm(model, path, names, reading[path], group.size, tensors) for path, names in scales.items()
    )
    read = {axis for norm in norms for axis in norm.readers}
    for axis in consumers:
        if axis not in read:
            raise _refused(f"{axis.tensor} reads it without a norm of its own before it")
    if len({norm.centres for norm in norms}) > 1:
        raise _refused("some of its norms subtract the mean, and some do not")
    return Stream(group.name, group.size, tuple(dict.fromkeys(writers)), norms)


def _refused(why: str) -> SettingError:
    return SettingError(
        f"rotate: expected a residual stream that layers write, and that other layers read through an RMS or "
        f"layer norm, but {why}. Prune units inside its blocks, or whole blocks, instead."
    )


def _group(graph: Graph) -> Group:
    """The group with the most places that norms mix."""
    found = [g for g in graph.groups if not g.exact and g.of_role("produce") and g.of_role("consume")]
    if not found:
        raise _refused("no group of this model is mixed by a norm alone")
    return max(found, key=lambda g: len(g.slices))


def _axis(piece: Slice, group: Group) -> Axis:
    whole = np.arange(group.size)
    if not (np.array_equal(piece.position, whole) and np.array_equal(piece.unit, whole)):
        raise _refused(f"axis {piece.axis} of {piece.tensor} holds more than the stream")
    return Axis(piece.tensor, piece.axis)


@torch.no_grad()
def _readers(
    model: nn.Module,
    norms: list[str],
    consumers: tuple[Axis, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, tuple[Axis, ...]]:
    """By norm the layers that are given what it returned: the same memory, or a part of it."""
    given: dict[str, list[Tensor]] = {name: [] for name in norms}
    found: dict[str, list[Axis]] = {name: [] for name in norms}
    owners: dict[str, list[Axis]] = {}
    for axis in consumers:
        owners.setdefault(axis.tensor.rpartition(".")[0], []).append(axis)
    handles = []

    def of_norm(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                given[name].append(output)

        return hook

    def of_layer(axes: list[Axis]) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            memory = {
                t.untyped_storage().data_ptr() for t in (*inputs, *named.values()) if isinstance(t, Tensor)
            }
            for name, outputs in given.items():
                if any(t.untyped_storage().data_ptr() in memory for t in outputs):
                    found[name].extend(axis for axis in axes if axis not in found[name])

        return hook

    try:
        for name in norms:
            handles.append(model.get_submodule(name).register_forward_hook(of_norm(name)))
        for path, axes in owners.items():
            hook = of_layer(axes)
            handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        with evaluating(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    counts: dict[Axis, int] = {}
    for axes in found.values():
        for axis in axes:
            counts[axis] = counts.get(axis, 0) + 1
    for axis, count in counts.items():
        if count > 1:
            raise _refused(f"{axis.tensor} reads {count} norms")
    return {name: tuple(axes) for name, axes in found.items()}


@torch.no_grad()
def _norm(
    model: nn.Module,
    path: str,
    names: list[str],
    readers: tuple[Axis, ...],
    width: int,
    tensors: Mapping[str, Tensor],
) -> Norm:
    """What a module with factors on the stream does, tried on random numbers in float64."""
    if not readers:
        raise _refused(f"no layer reads {path}: it lies between a layer and the stream, or on the stream")
    weight, *rest = sorted(names, key=lambda n: n.rpartition(".")[2] != "weight")
    if len(rest) > 1 or any(tensors[n].ndim != 1 for n in names):
        raise _refused(f"{path} has {len(names)} tensors on it")
    bias = rest[0] if rest else None
    module = double_copy(model.get_submodule(path)).eval()
    own = dict(module.named_parameters(recurse=False))
    x = torch.randn(8, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10 + 3
    x = x.to(tensors[weight].device)
    if bias is not None:
        own[bias.rpartition(".")[2]].zero_()
    factor = own[weight.rpartition(".")[2]]
    for neutral in (1.0, 0.0):
        factor.fill_(neutral)
        (out,) = run_doubled(module, (x,), {})
        for centres in (False, True):
            y = x - x.mean(1, keepdim=True) if centres else x
            scale = (out * y).sum(1, keepdim=True) / y.square().sum(1, keepdim=True)
            size = scale.square() * y.square().mean(1, keepdim=True)
            alike = (out - scale * y).norm() <= 1e-9 * out.norm()
            if bool(alike) and float((size - 1).abs().max()) < 1e-2:
                if bias is not None and not centres:
                    raise _refused(f"{path} is an RMS norm with a bias")
                return Norm(path, weight, bias, centres, neutral, readers)
    raise _refused(f"{path} is neither an RMS norm nor a layer norm")
