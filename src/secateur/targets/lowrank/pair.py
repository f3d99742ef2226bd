"""Two layers in the place of one, and the way back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.targets.units.copying import duplicate

M = TypeVar("M", bound=nn.Module)

FIRST, SECOND = "first", "second"
"""Names of the two layers inside a `LowRank`."""

_DENSE = "_dense"


class LowRank(nn.Sequential):
    """Two layers in the place of one: ``second(first(x))``.

    The layer before was a linear layer, or a convolution with a kernel of 1; so are both layers here. `rank`
    directions lie between them. Reading `weight` and `bias` gives those of the one layer that computes the
    same, in the layout of the layer before. They are computed each time; change ``first`` and ``second``
    instead.

    Args:
        first: From the inputs to the directions.
        second: From the directions to the outputs.
        transposed: Whether the layer before had its weight as [in, out], as Transformers' ``Conv1D`` has.

    Example:
        >>> pair = LowRank(nn.Linear(4, 1, bias=False), nn.Linear(1, 3))
        >>> pair.rank, pair.weight.shape, sum(p.numel() for p in pair.parameters())
        (1, torch.Size([3, 4]), 10)
    """

    def __init__(self, first: nn.Module, second: nn.Module, *, transposed: bool = False) -> None:
        super().__init__(OrderedDict([(FIRST, first), (SECOND, second)]))
        self.transposed = transposed

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(tensors_of(self[0])[0])

    @property
    def weight(self) -> Tensor:
        """The product of both weights, in the layout of the layer before."""
        (b, _), (a, _) = map(tensors_of, self)
        product = a.flatten(1) @ b.flatten(1)
        return product.t() if self.transposed else product.reshape(len(a), b.shape[1], *b.shape[2:])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the single layer that computes the same; None if there is none."""
        (_, inner), (weight, outer) = map(tensors_of, self)
        moved = None if inner is None else weight.flatten(1) @ inner
        if moved is None or outer is None:
            return outer if moved is None else moved
        return outer + moved

    @property
    def in_features(self) -> int:
        """Inputs of ``first``."""
        return tensors_of(self[0])[0].shape[1]

    @property
    def out_features(self) -> int:
        """Outputs of ``second``."""
        return len(tensors_of(self[1])[0])

    in_channels, out_channels = in_features, out_features
    """The same of a convolution."""


def pairs_of(model: nn.Module) -> dict[str, LowRank]:
    """The pairs in a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRank)}


def tensors_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a linear layer."""
    return layer.weight, layer.bias


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight of a layer is [in, out]: Transformers' ``Conv1D``."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight of a layer as a matrix. [out, in]"""
    weight = tensors_of(layer)[0].detach()
    return weight.t() if is_transposed(layer) else weight.flatten(1)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Number of outputs and of inputs."""
    out, into = matrix_of(layer).shape
    return out, into


def most_directions(layer: nn.Module) -> int:
    """The largest rank with which a pair has fewer parameters than the layer; 0 if none has.

    A layer with a bias gets two, so a direction costs one parameter more.

    Example:
        >>> most_directions(nn.Linear(8, 8, bias=False)), most_directions(nn.Linear(8, 8))
        (3, 3)
    """
    out, into = sizes(layer)
    return (out * into - 1) // (out + into + (layer.bias is not None))


def empty_pair(layer: nn.Module, rank: int | None = None) -> LowRank:
    """Make a pair for a layer, with uninitialised tensors.

    Args:
        layer: The layer.
        rank: Number of directions; as many as the layer can have if not given.
    """
    out, into = sizes(layer)
    rank = min(out, into) if rank is None else rank
    weight, bias = tensors_of(layer)
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "bias": bias is not None}
    first: nn.Module
    second: nn.Module
    if isinstance(layer, nn.Conv2d):
        first = nn.utils.skip_init(nn.Conv2d, into, rank, 1, stride=layer.stride, **options)
        second = nn.utils.skip_init(nn.Conv2d, rank, out, 1, **options)
    else:
        first = nn.utils.skip_init(nn.Linear, into, rank, **options)
        second = nn.utils.skip_init(nn.Linear, rank, out, **options)
    for parameter in (*first.parameters(), *second.parameters()):
        parameter.requires_grad_(weight.requires_grad)
    return LowRank(first, second, transposed=is_transposed(layer)).train(layer.training)


@torch.no_grad()
def filled_pair(layer: nn.Module, directions: Tensor, mean: Tensor | None) -> LowRank:
    """Make the pair with all directions, which computes what the layer does.

    Args:
        layer: The layer, which the pair remembers: `dense_of`.
        directions: Orthonormal columns that span all outputs of the weight, the direction of the largest
            outputs first. float64 [out, directions]
        mean: The mean of the outputs without the bias, [out]; None if the layer has no bias.
    """
    pair = empty_pair(layer, directions.shape[1])
    (inner, shift), (outer, bias) = map(tensors_of, pair)
    inner.copy_((directions.T @ matrix_of(layer).double()).reshape(inner.shape))
    outer.copy_(directions.reshape(outer.shape))
    own = tensors_of(layer)[1]
    if mean is not None and own is not None and shift is not None and bias is not None:
        shift.copy_(-(directions.T @ mean))
        bias.copy_(own.double() + mean)
    vars(pair)[_DENSE] = layer
    return pair


def dense_of(pair: LowRank) -> nn.Module | None:
    """The single layer that a pair with all directions was made of; None if the pair does not have it."""
    layer: nn.Module | None = vars(pair).get(_DENSE)
    return layer


def copy_without_layers(model: M, modules: Mapping[str, nn.Module]) -> M:
    """Copy a model without the single layers of its pairs (`dense_of`), and with other modules at some paths.

    Args:
        model: The model.
        modules: The other modules, by path.
    """
    memo: dict[int, object] = {id(dense_of(pair)): None for pair in pairs_of(model).values()}
    memo.pop(id(None), None)
    copy = duplicate(model, memo | {id(model.get_submodule(path)): m for path, m in modules.items()})
    for pair in pairs_of(copy).values():
        vars(pair).pop(_DENSE, None)
    return copy


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace the modules at some paths, in place."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module
