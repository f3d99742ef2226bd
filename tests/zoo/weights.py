"""Random weights that make every part of a network count.

Nothing is downloaded. Weights are random but deterministic, and no parameter stays constant: heads,
layer scales and residual scales that constructors set to zero would hide whatever feeds them, and with
it every mistake. `settle` then gives batch norms statistics that fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

Inputs = tuple[Tensor, ...] | Mapping[str, Tensor]
"""Positional or keyword arguments of a model."""

_RANDOM_FILLS = frozenset(
    {
        Tensor.normal_,
        Tensor.uniform_,
        # These announce themselves as a whole, and what they call is then not seen.
        nn.init.normal_,
        nn.init.uniform_,
        nn.init.trunc_normal_,
        nn.init.kaiming_normal_,
        nn.init.kaiming_uniform_,
        nn.init.xavier_normal_,
        nn.init.xavier_uniform_,
    }
)


class _DeferredFills(TorchFunctionMode):
    """Turns random fills into zeros while a model is built, and remembers which tensors they were for.

    Initialising weights is most of what building a large model costs, and several models do it twice.
    Zeros rather than nothing, because a constructor may copy what it has filled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RANDOM_FILLS:
            tensor = args[0] if args else (kwargs or {})["tensor"]
            self.tensors[id(tensor)] = tensor
            tensor.detach().zero_()
            return tensor
        return func(*args, **(kwargs or {}))


def build(construct: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """`construct()` in eval mode, with deterministic weights; global random state is left alone.

    Weights are uniform with He's variance, which keeps activations of ReLU networks at one scale.
    Parameters that the constructor filled with one value are spread around it: scales around 1, shifts
    around 0; scales that start near 0 (of layers and of residual branches) get 0.1 to 0.5.
    """
    deferred = _DeferredFills()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with deferred:
            model = construct()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in deferred.tensors.values():
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 600
            bound = math.sqrt(6 / fan_in)
            tensor.uniform_(-bound, bound, generator=generator)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and (parameter.numel() > 1 or parameter.ndim > 1):
                _spread(name, parameter, generator)
    return model.eval()


def _spread(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Make a parameter that is the same everywhere vary."""
    value = float(parameter.flatten()[0])
    if not bool((parameter == value).all()):
        return
    if abs(value) >= 0.1:
        parameter.uniform_(0.5, 1.5, generator=generator).mul_(value)
    elif value != 0 or ("weight" in name and parameter.ndim == 1):
        parameter.uniform_(0.1, 0.5, generator=generator)
    else:
        bound = 0.2 if parameter.ndim == 1 else math.sqrt(6 / parameter[0].numel())
        parameter.uniform_(-bound, bound, generator=generator)


@contextmanager
def _collecting_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the passes, whatever was there before
            norm.train()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def settle(model: nn.Module, batches: Sequence[Inputs]) -> nn.Module:
    """Sets `model`'s batch-norm statistics to their average over `batches`; returns `model`.

    Args:
        model: In eval mode; only its batch norms see training mode, so nothing is dropped at random.
        batches: Arguments of the model, each with two samples or more. Images may have half the side of
            those to come, for speed; with much less the statistics do not carry over.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if norms:
        with torch.no_grad(), _collecting_statistics(norms):
            for batch in batches:
                call(model, batch)
    return model


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for positional or keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
