"""Which weights of a model can be masked, and what any choice of them costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.errors import NothingToPruneError
from secateur.graph.graph import fingerprint
from secateur.graph.weight import WeightGroup
from secateur.masks.offload import same_tensor
from secateur.models import unwrap

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers whose weights are masked: each output multiplies its inputs with weights of its own."""


@dataclass(frozen=True)
class WeightCost:
    """What `Budget(sparsity=...)` bounds.

    Attributes:
        weights: How many of the maskable weights are not masked.
    """

    weights: int


@dataclass(frozen=True, eq=False)
class Weights:
    """The maskable weights of a model: what `Graph` is for units.

    Weights of linear layers and convolutions, each tensor a group of its entries. A weight that another kind
    of layer reads as well, such as an embedding tied to the last layer, is left out.

    Attributes:
        groups: The weight tensors, in the model's order.
        fingerprint: As a graph's.
        parameters: How many parameters the model has in all.
        alone: Other layers with weights, which no mask touches, as ``rnn (LSTM)``, with the number of their
            parameters.

    Raises:
        NothingToPruneError: On `of`: there is none.
    """

    groups: tuple[WeightGroup, ...]
    fingerprint: str
    parameters: int = 0
    alone: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Those of a model, which is left as it is."""
        model = unwrap(model)
        layers = layers_of(model)
        if not layers:
            raise NothingToPruneError(
                "weights: expected a linear layer or a convolution, got none whose weight is its own. "
                "Prune units instead."
            )
        groups = (WeightGroup.of(name, tuple(found[0].weight.shape)) for name, found in layers.items())
        return cls(tuple(groups), fingerprint(model), *rest_of(model))

    def cost(self, keep: Mapping[str, NDArray[np.bool_]] | None = None) -> WeightCost:
        """The number of weights that stay, with `keep` [group.size] by name; unnamed tensors stay."""
        given = keep or {}
        counts = (int(given[g.name].sum()) if g.name in given else g.size for g in self.groups)
        return WeightCost(sum(counts))


def rest_of(model: nn.Module) -> tuple[int, dict[str, int]]:
    """How many parameters a model has, and the layers with weights that are not masked: see `Weights`."""
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
    """Per weight, by its first name in the state dict, the layers that read it, in the model's order."""
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
