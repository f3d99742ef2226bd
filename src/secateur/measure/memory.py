"""How much memory a model takes: weights, what a forward pass holds at its peak, and the key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.common.models import device_of, evaluating
from secateur.common.outputs import tensors_of
from secateur.compat.profiling import most_allocated
from secateur.errors import SettingError
from secateur.measure.cost import weight_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes.

    Attributes:
        weights: Parameters and buffers.
        activations: The inputs and everything else that a forward pass holds, at the moment when it is most.
        cache: The key-value cache.
    """

    weights: int
    activations: int
    cache: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.cache


def memory(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    tokens: int | None = None,
) -> Memory:
    """Measure what a model takes for a forward pass in evaluation mode, without gradients.

    The pass runs once. PyTorch's allocator says what it held at its peak, what operators hold inside
    included, such as the working space of a convolution.

    Args:
        model: The model. It is not changed.
        args: Positional inputs, on the model's device.
        kwargs: Keyword inputs.
        tokens: For a language model: how many tokens of each sample the key-value cache holds. What one
            token takes is measured. The pass itself runs without the cache.

    Raises:
        SettingError: `tokens` is given, but the model gives no key-value cache.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> memory(net, (torch.zeros(5, 4),)).weights
        232
    """
    named = dict(kwargs or {})
    with evaluating(model, fast_path=True), torch.no_grad():
        if "use_cache" in inspect.signature(model.forward).parameters:
            named.setdefault("use_cache", False)
        peak = _peak(model, args, named)
        cache = 0 if tokens is None else _cache(model, args, named, tokens)
    return Memory(weight_bytes(model), peak, cache)


def _peak(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Bytes that a pass holds at most, inputs included: under `evaluating` the model gets copies of them."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model(*args, **kwargs)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return most_allocated(lambda: model(*args, **kwargs))


_LENGTHS = 8, 16


def _cache(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int) -> int:
    """Bytes of the cache for so many tokens of each sample.

    Measured after two short passes, whose difference is what a token takes: that follows the heads which
    the model has, whatever its class calls them. A cache that stops growing takes no more than this.
    """
    sizes = []
    for length in _LENGTHS:
        short = [_shortened(value, length) for value in args]
        named = {name: _shortened(value, length) for name, value in kwargs.items()}
        found = None
        if "use_cache" in kwargs:
            output = model(*short, **{**named, "use_cache": True})
            found = getattr(output, "past_key_values", None)
        if found is None:
            raise SettingError(
                f"memory: expected a model that gives a key-value cache when called with use_cache=True, "
                f"for tokens={tokens}, got {type(model).__name__}, which gives none. Leave tokens out."
            )
        sizes.append(sum(t.nbytes for t in _cached(found)))
    each = (sizes[1] - sizes[0]) / (_LENGTHS[1] - _LENGTHS[0])
    return round(sizes[0] + each * (tokens - _LENGTHS[0]))


def _cached(cache: Any) -> list[Tensor]:
    """The tensors of a cache, of whatever class."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return tensors_of(cache)
    return [t for layer in layers for t in vars(layer).values() if isinstance(t, Tensor) and t.ndim]


def _shortened(value: Any, length: int) -> Any:
    """Ids or a mask [batch, words] with so many words, repeated where there are fewer; else as it is."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.is_floating_point():
        return value
    times = -(-length // value.shape[1])
    return value.repeat(1, times)[:, :length]
