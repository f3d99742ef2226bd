"""Attributes of PyTorch's own layers that repeat the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.targets.units.tensors import groups_after

Stays = Callable[[str, int], NDArray[np.bool_]]
"""A function from (name of a tensor in the layer, axis) to the positions of the old axis that stay."""

Sizes = Mapping[str, object]
"""Name of an attribute -> its new value."""


def bilinear(layer: nn.Module, stays: Stays) -> Sizes:
    """Return new `out_features`, `in1_features` and `in2_features`."""
    names = ("out_features", "in1_features", "in2_features")
    return {name: int(stays("weight", axis).sum()) for axis, name in enumerate(names)}


def convolution(layer: nn.Module, stays: Stays) -> Sizes:
    """Return new `in_channels`, `out_channels` and `groups`."""
    groups = groups_after(stays("weight", 0), layer.groups)  # type: ignore[arg-type]
    first, second = int(stays("weight", 0).sum()), int(stays("weight", 1).sum()) * groups
    into, out = (first, second) if layer.transposed else (second, first)
    return {"in_channels": into, "out_channels": out, "groups": groups}


def linear(layer: nn.Module, stays: Stays) -> Sizes:
    """Return new `in_features` and `out_features`."""
    return {"out_features": int(stays("weight", 0).sum()), "in_features": int(stays("weight", 1).sum())}


def channel_norm(layer: nn.Module, stays: Stays) -> Sizes:
    """Return a new `num_features`."""
    tensor = "weight" if getattr(layer, "weight", None) is not None else "running_mean"
    return {} if getattr(layer, tensor, None) is None else {"num_features": int(stays(tensor, 0).sum())}


def shape_norm(layer: nn.Module, stays: Stays) -> Sizes:
    """Return a new `normalized_shape`."""
    rank = len(layer.normalized_shape)  # type: ignore[arg-type]
    return {"normalized_shape": tuple(int(stays("weight", k).sum()) for k in range(rank))}


def group_norm(layer: nn.Module, stays: Stays) -> Sizes:
    """Return new `num_channels` and `num_groups`."""
    mask = stays("weight", 0)
    return {"num_channels": int(mask.sum()), "num_groups": groups_after(mask, layer.num_groups)}  # type: ignore[arg-type]


def embedding(layer: nn.Module, stays: Stays) -> Sizes:
    """Return new `num_embeddings` and `embedding_dim`."""
    return {"num_embeddings": int(stays("weight", 0).sum()), "embedding_dim": int(stays("weight", 1).sum())}


def slope(layer: nn.Module, stays: Stays) -> Sizes:
    """Return a new `num_parameters`."""
    return {"num_parameters": int(stays("weight", 0).sum())}


def recurrent(layer: nn.Module, stays: Stays) -> Sizes:
    """Return new `input_size`, `hidden_size` and `proj_size`."""
    first = "" if isinstance(layer, nn.RNNCellBase) else "_l0"
    sizes = {
        "input_size": int(stays(f"weight_ih{first}", 1).sum()),
        "hidden_size": int(stays(f"weight_hh{first}", 1).sum()),
    }
    if getattr(layer, "proj_size", 0):
        sizes["proj_size"] = sizes["hidden_size"]
        sizes["hidden_size"] = int(stays("weight_hr_l0", 1).sum())
    return sizes


LAYERS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[nn.Module, Stays], Sizes]], ...] = (
    ((nn.modules.conv._ConvNd,), convolution),
    ((nn.Linear,), linear),
    ((nn.Bilinear,), bilinear),
    ((nn.modules.batchnorm._NormBase,), channel_norm),
    ((nn.LayerNorm,) + ((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()), shape_norm),
    ((nn.GroupNorm,), group_norm),
    ((nn.Embedding, nn.EmbeddingBag), embedding),
    ((nn.PReLU,), slope),
    ((nn.RNNBase, nn.RNNCellBase), recurrent),
)
"""Classes of layers, each with the function that returns new values of its attributes."""


def follows(layer: nn.Module) -> bool:
    """Whether a layer's attributes with sizes are all known here, so that it works with smaller tensors."""
    return isinstance(layer, nn.MultiheadAttention) or any(
        isinstance(layer, classes) for classes, _ in LAYERS
    )


def new_attributes(layer: nn.Module, stays: Stays) -> Sizes:
    """Return new values for the attributes of a layer whose tensors are cut; none for an unknown class."""
    for classes, function in LAYERS:
        if isinstance(layer, classes):
            return function(layer, stays)
    return {}
