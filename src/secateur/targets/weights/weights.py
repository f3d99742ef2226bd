"""Find the weights of a model that can be masked, and count those that a mask keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.allocators.base import Allocator
from secateur.allocators.limits import Limits
from secateur.allocators.registry import RULES
from secateur.common.models import unwrap
from secateur.common.offload import same_tensor
from secateur.errors import NothingToPruneError, SettingError
from secateur.graph.graph import fingerprint
from secateur.graph.groups import WeightGroup

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layer types whose weights can be masked: each output has its own weights for its inputs."""


@dataclass(frozen=True)
class WeightCost:
    """The cost that `Budget(sparsity=...)` bounds.

    Attributes:
        weights: Number of maskable weights that are kept.
    """

    weights: int


@dataclass(frozen=True, eq=False)
class Weights:
    """The maskable weights of a model: what `sc.trace` returns for granularity ``weight``.

    `sc.score` and allocators take it like a `Graph`. These are the weights of linear layers and convolutions.
    Each tensor is one group, and each entry is one unit. A weight that another kind of layer also uses, such
    as an embedding tied to the last layer, is left out.

    Attributes:
        groups: One group for each weight tensor, in the model's order.
        model: The model itself, not a copy.
        fingerprint: Fingerprint of the model, as in a graph.
        parameters: Number of parameters of the whole model.
        alone: Number of parameters of each other layer with weights, by a name such as ``rnn (LSTM)``. No
            mask covers these layers.
    """

    granularity: ClassVar[Literal["weight"]] = "weight"

    groups: tuple[WeightGroup, ...]
    model: nn.Module = field(repr=False)
    fingerprint: str
    parameters: int = 0
    alone: Mapping[str, int] = field(default_factory=dict)

    def adapted(self, rule: Allocator, limits: Limits) -> tuple[Allocator, Limits]:
        """The rule and the limits as they are.

        Raises:
            SettingError: The rule decides on units only.
        """
        if not rule.on_weights:
            known = ", ".join(name for name, other in RULES.items() if other.on_weights)
            raise SettingError(
                f"masks: expected a rule for single weights, got {rule!r}. Use one of {known}."
            )
        return rule, limits

    def cost(self, keep: Mapping[str, NDArray[np.bool_]] | None = None) -> WeightCost:
        """Count the kept weights.

        Args:
            keep: Vectors by weight name, True for weights that stay [group.size]. A tensor without a vector
                is kept whole.
        """
        given = keep or {}
        counts = (int(given[g.name].sum()) if g.name in given else g.size for g in self.groups)
        return WeightCost(sum(counts))


def trace(model: nn.Module) -> Weights:
    """Find the maskable weights of a model, which is not changed: see `secateur.trace`.

    Raises:
        NothingToPruneError: The model has no such weight.
    """
    model = unwrap(model)
    layers = layers_of(model)
    if not layers:
        raise NothingToPruneError(
            "weights: expected a linear layer or a convolution, got none whose weight is its own. "
            "Prune units instead."
        )
    groups = (WeightGroup.of(name, tuple(found[0].weight.shape)) for name, found in layers.items())
    return Weights(tuple(groups), model, fingerprint(model), *rest_of(model))


def rest_of(model: nn.Module) -> tuple[int, dict[str, int]]:
    """Count all parameters of a model, and those of each layer that masks do not cover.

    Returns:
        `parameters` and `alone`, as in `Weights`.
    """
    masked = {same_tensor(found[0], "weight") for found in layers_of(model).values()}
    sizes: dict[int, int] = {}
    alone: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensor = same_tensor(module, name)
            if tensor not in masked | sizes.keys() and parameter.ndim > 1:
                layer = f"{path or 'the model'} ({type(module).__name__})"
                alone[layer] = alone.get(layer, 0) + parameter.numel()
            sizes[tensor] = parameter.numel()
    return sum(sizes.values()), alone


def layers_of(model: nn.Module) -> dict[str, list[Layer]]:
    """Map each maskable weight to the layers that use it, in the model's order.

    Returns:
        Layers by the first name of the weight in the state dict. A shared weight has several layers.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            owners.setdefault(same_tensor(module, name), []).append(
                (f"{path}.{name}" if path else name, module)
            )
    found: dict[str, list[Layer]] = {}
    for owned in owners.values():
        layers = [module for name, module in owned if name.rpartition(".")[2] == "weight"]
        if len(layers) == len(owned) and all(isinstance(layer, LAYERS) for layer in layers):
            found[owned[0][0]] = [layer for layer in layers if isinstance(layer, LAYERS)]
    return found
