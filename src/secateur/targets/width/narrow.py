"""Fewer units in the residual stream of a rotated model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.common.models import device_of, named_tensors
from secateur.errors import SettingError, VerificationError
from secateur.graph.trace import trace
from secateur.plan import Plan
from secateur.targets.units.apply import apply
from secateur.targets.units.compare import double_copy, relative_difference, run_in_double
from secateur.targets.units.copying import duplicate
from secateur.targets.units.later_calls.callcheck import suspend
from secateur.targets.width.rotate import TOLERANCE, change, factors_of, helmert
from secateur.targets.width.stream import Stream, find_stream


def narrowed(
    rotated: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], width: int
) -> tuple[nn.Module, nn.Module]:
    """The model with `width` units of its stream, proven; and the dense one on the same scale.

    Args:
        rotated: What `secateur.rotate` returned.
        args: Positional arguments for a forward pass.
        kwargs: Its keyword arguments.
        width: Number of units that stay.

    Raises:
        SettingError: The model is not rotated, or `width` is not from 2 to the stream's width - 1.
        VerificationError: The result is not the rotated model whose norms read the first units alone.
    """
    graph = trace(rotated, kwargs or args, allow_inexact=True)
    stream = find_stream(rotated, graph, args, kwargs)
    _check(rotated, stream, width)
    keep = {stream.group: np.arange(stream.width) < width}
    plan = Plan.build(graph, keep, allocator="narrow", settings={"width": width})
    small = apply(scaled(rotated, stream, width), plan, "module", example_inputs=kwargs or args)
    double = _filled(double_copy(small), scaled(double_copy(rotated), stream, width))
    wanted = run_in_double(projected(rotated, stream, width), args, kwargs)
    difference = relative_difference(run_in_double(double, args, kwargs), wanted)
    if not difference <= TOLERANCE:
        raise VerificationError(
            f"narrow: expected the narrowed {type(rotated).__name__} to equal the rotated one without the "
            f"removed directions to {TOLERANCE:.1g} relative in float64, got {difference:.3g}. Something "
            "else than norms followed by layers acts on the stream. Prune other units instead."
        )
    return small, scaled(rotated, stream, width, readers=False)


@torch.no_grad()
def _filled(small: nn.Module, model: nn.Module) -> nn.Module:
    """The first module with the first units of the second one's stream, which no kernel has to capture."""
    tensors = named_tensors(model)
    for name, tensor in named_tensors(small).items():
        tensor.copy_(tensors[name][tuple(map(slice, tensor.shape))])
    return small


def _check(model: nn.Module, stream: Stream, width: int) -> None:
    if not isinstance(width, int) or not 2 <= width < stream.width:
        raise SettingError(
            f"narrow(width={width!r}): expected a number from 2 to {stream.width - 1}, less than the stream "
            f"of {type(model).__name__} has. Choose one."
        )
    tensors = named_tensors(model)
    for norm in stream.norms:
        plain = bool((factors_of(model, norm, stream.width) == 1).all())
        if not plain or (norm.bias is not None and not bool((tensors[norm.bias] == 1).all())):
            raise SettingError(
                f"narrow: expected a model that rotate returned, got one whose norm {norm.path} still has "
                "weights of its own. Pass sc.rotate(model, calibration)."
            )


@torch.no_grad()
def scaled(model: nn.Module, stream: Stream, width: int, *, readers: bool = True) -> nn.Module:
    """A copy whose first `width` units are those of the narrowed model; the others are to be cut off.

    Args:
        model: The rotated model.
        stream: Its stream.
        width: Number of units that stay.
        readers: Also change what reads the norms. Without that, and with all its units, the copy computes
            what the model does, but for the norms' epsilon.
    """
    copy = duplicate(model)
    suspend(copy)
    tensors, factor = named_tensors(copy), math.sqrt(width / stream.width)

    def without_mean(t: Tensor) -> Tensor:
        return t - t[..., :width].mean(-1, keepdim=True)

    def write(t: Tensor) -> Tensor:  # a layer norm takes the mean away
        return factor * (without_mean(t) if stream.centred and readers else t)

    def read(t: Tensor) -> Tensor:
        return (without_mean(t) if stream.centred else t) / factor

    def read_biased(t: Tensor) -> Tensor:  # the norm's bias is 1 everywhere: its part is the sum
        return read(t) + t.sum(-1, keepdim=True) / width

    for axis in stream.writers:
        change(tensors, axis, write)
    for norm in stream.norms if readers else ():
        for axis in norm.readers:
            change(tensors, axis, read if norm.bias is None else read_biased)
    return copy


def projected(model: nn.Module, stream: Stream, width: int) -> nn.Module:
    """A copy in float64 whose norms read a stream without the removed directions: the reference."""
    copy = double_copy(model)
    device = device_of(copy)
    if stream.centred:
        kept = helmert(stream.width)[:, : width - 1]
        onto = (kept @ kept.T).to(device)
    else:
        onto = torch.diag((torch.arange(stream.width) < width).double()).to(device)

    def project(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] @ onto, *inputs[1:])

    for norm in stream.norms:
        copy.get_submodule(norm.path).register_forward_pre_hook(project)
    return copy
