"""Layers as linear regressions: their input as a matrix of columns, their output as targets.

A layer that multiplies its input with a weight and sums is ``Y = X W + b``: each position of its output
gives a row, each input that a position reads gives a column. A grouped convolution is as many
regressions as it has groups. If there are more positions than needed, some of each sample are enough.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from secateur.calibration.padding import Padding
from secateur.stream.calls import Call, ProgramCalls
from secateur.stream.roworder import positions_come_first

_CHUNK = 1 << 23
"""Number of entries of the column matrix that are made at once."""


class Layer(ABC):
    """A kind of layer, seen as a regression."""

    x: str = "input"
    weight: str = "weight"
    bias: str | None = "bias"
    """Names of the operator's arguments."""

    def fits(self, call: Call) -> bool:
        """Whether the regression describes this call, with samples along axis 0 of its input."""
        return bool(call.arguments()[self.x].meta["val"].ndim >= 2)

    @abstractmethod
    def columns(self, x: Tensor, weight: Tensor, call: Call, places: Tensor | None = None) -> Tensor:
        """Return the inputs that each position of the output reads. [groups, positions, columns]

        Args:
            x: The input.
            weight: The weight.
            call: The call.
            places: The positions to take from each sample. None: all. [samples, positions of one]
        """

    @abstractmethod
    def targets(self, y: Tensor, weight: Tensor, call: Call, places: Tensor | None = None) -> Tensor:
        """Return the output, one row for each chosen position. [groups, positions, outputs]"""

    @abstractmethod
    def matrix(self, weight: Tensor, call: Call) -> Tensor:
        """Return the weight as a matrix. [groups, columns, outputs]"""

    @abstractmethod
    def unmatrix(self, matrix: Tensor, weight: Tensor, call: Call) -> Tensor:
        """Return a matrix as a weight, in the shape of `weight`: the inverse of `matrix`."""

    def outputs(self, weight: Tensor, call: Call) -> int:
        """Return the number of outputs at each position, over all groups."""
        matrix = self.matrix(weight, call)
        return len(matrix) * matrix.shape[2]


class Linear(Layer):
    """x [..., in] times weight [out, in] transposed."""

    def columns(self, x: Tensor, weight: Tensor, call: Call, places: Tensor | None = None) -> Tensor:
        """[1, positions, in]"""
        rows = x.reshape(1, len(x), math.prod(x.shape[1:-1]), x.shape[-1])  # an expert may get no token
        return _at(rows, places).reshape(1, -1, x.shape[-1])

    def targets(self, y: Tensor, weight: Tensor, call: Call, places: Tensor | None = None) -> Tensor:
        """[1, positions, out]"""
        return self.columns(y, weight, call, places)

    def matrix(self, weight: Tensor, call: Call) -> Tensor:
        """[1, in, out]"""
        return weight.t()[None]

    def unmatrix(self, matrix: Tensor, weight: Tensor, call: Call) -> Tensor:
        """[out, in]"""
        return matrix[0].t()


@dataclass(frozen=True)
class Product(Linear):
    """x [..., in] times weight [in, out]: matmul and addmm with a parameter."""

    x: str = "self"
    weight: str = "other"
    bias: str | None = None

    def fits(self, call: Call) -> bool:
        """Whether the weight is a matrix, and the product is not scaled."""
        given = call.arguments()
        plain = given.get("alpha", 1) == 1 and given.get("beta", 1) == 1
        return plain and super().fits(call) and given[self.weight].meta["val"].ndim == 2

    def matrix(self, weight: Tensor, call: Call) -> Tensor:
        """[1, in, out]"""
        return weight[None]

    def unmatrix(self, matrix: Tensor, weight: Tensor, call: Call) -> Tensor:
        """[in, out]"""
        return matrix[0]


def _per_axis(value: Any, axes: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * axes if len(values) == 1 else values


class Convolution(Layer):
    """Input [batch, in, *map], weight [out, in / groups, *kernel]; of any rank, stride and dilation."""

    def fits(self, call: Call) -> bool:
        """With a batch axis."""
        given = call.arguments()
        return bool(given[self.x].meta["val"].ndim == given[self.weight].meta["val"].ndim)

    def columns(self, x: Tensor, weight: Tensor, call: Call, places: Tensor | None = None) -> Tensor:
        """[groups, batch * output map, in / groups * kernel]"""
        given = call.arguments()
        axes = weight.ndim - 2
        kernel, stride, dilation = (
            weight.shape[2:],
            *(_per_axis(given[k], axes) for k in ("stride", "dilation")),
        )
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if given["padding"] == "same":
            amounts = [(r // 2, r - r // 2) for r in reach]
        elif given["padding"] == "valid":
            amounts = [(0, 0)] * axes
        else:
            amounts = [(p, p) for p in _per_axis(given["padding"], axes)]
        x = F.pad(x, [n for pair in reversed(amounts) for n in pair])
        return _patches(x, int(given["groups"]), reach, stride, dilation, places)

    def targets(self, y: Tensor, weight: Tensor, call: Call, places: Tensor | None = None) -> Tensor:
        """[groups, batch * output map, out / groups]"""
        groups = int(call.arguments()["groups"])
        y = y.flatten(2)
        if places is not None:
            y = y.gather(2, places[:, None].expand(-1, y.shape[1], -1))
        by_group: Tensor = y.unflatten(1, (groups, -1))
        return by_group.movedim((1, 2), (0, -1)).flatten(1, 2)

    def matrix(self, weight: Tensor, call: Call) -> Tensor:
        """[groups, in / groups * kernel, out / groups]"""
        groups = int(call.arguments()["groups"])
        return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)

    def unmatrix(self, matrix: Tensor, weight: Tensor, call: Call) -> Tensor:
        """[out, in / groups, *kernel]"""
        return matrix.transpose(1, 2).reshape(weight.shape)


class Transposed(Convolution):
    """Transposed: weight [in, out / groups, *kernel]. It is a convolution of the input spread apart."""

    def columns(self, x: Tensor, weight: Tensor, call: Call, places: Tensor | None = None) -> Tensor:
        """[groups, batch * output map, in / groups * kernel]"""
        given = call.arguments()
        axes = weight.ndim - 2
        stride, padding, extra, dilation = (
            _per_axis(given[k], axes) for k in ("stride", "padding", "output_padding", "dilation")
        )
        reach = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
        spread = x.new_zeros(
            *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True))
        )
        every: list[slice] = [slice(None, None, step) for step in (1, 1, *stride)]
        spread[tuple(every)] = x
        amounts = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
        spread = F.pad(spread, [n for pair in reversed(amounts) for n in pair])
        return _patches(spread, int(given["groups"]), reach, [1] * axes, dilation, places)

    def matrix(self, weight: Tensor, call: Call) -> Tensor:
        """[groups, in / groups * kernel, out / groups]"""
        groups = int(call.arguments()["groups"])
        weight = weight.flip(list(range(2, weight.ndim))).unflatten(0, (groups, -1))
        return weight.movedim(2, -1).reshape(groups, -1, weight.shape[2])

    def unmatrix(self, matrix: Tensor, weight: Tensor, call: Call) -> Tensor:
        """[in, out / groups, *kernel]"""
        groups = len(matrix)
        found = matrix.reshape(groups, weight.shape[0] // groups, *weight.shape[2:], weight.shape[1])
        return found.movedim(-1, 2).flatten(0, 1).flip(list(range(2, weight.ndim)))


def counted(real: Tensor | None, places: Tensor | None = None) -> Tensor | slice:
    """Return the index of those rows of a matrix of columns or targets that are no padding.

    Args:
        real: Which positions are none, bool [samples, positions]; None: all.
        places: The positions of each sample that were taken. [samples, positions taken]; None: all.
    """
    if real is None:
        return slice(None)
    return (real if places is None else real.gather(1, places)).reshape(-1)


def _at(rows: Tensor, places: Tensor | None) -> Tensor:
    """Some of the rows [groups, batch, positions, entries] of each sample."""
    return rows if places is None else rows[:, torch.arange(len(places), device=rows.device)[:, None], places]


def _patches(
    x: Tensor, groups: int, reach: list[int], stride: list[int], dilation: list[int], places: Tensor | None
) -> Tensor:
    """The entries that each position of a sliding kernel covers. [groups, batch * positions, columns]"""
    axes = len(reach)
    x = x.unflatten(1, (groups, -1))
    for k in range(axes):
        x = x.unfold(3 + k, reach[k] + 1, stride[k])
    # [batch, groups, in / groups, *positions, *covered]
    every: list[slice] = [slice(None, None, step) for step in (*[1] * (3 + axes), *dilation)]
    x = x[tuple(every)]
    x = x.movedim(1, 0).movedim(2, 2 + axes)
    columns = x.shape[2 + axes :].numel()
    if places is not None:
        sample = torch.arange(len(places), device=x.device)[:, None]
        at = torch.unravel_index(places, x.shape[2 : 2 + axes])
        chosen: tuple[Any, ...] = (slice(None), sample, *at)
        x = x[chosen]
    return x.reshape(groups, -1, columns)


LAYERS: dict[str, Layer] = {
    "aten.linear.default": Linear(),
    "aten.matmul.default": Product(),
    "aten.mm.default": Product(weight="mat2"),
    "aten.addmm.default": Product("mat1", "mat2", "self"),
    **dict.fromkeys(
        (f"aten.conv{n}d.{kind}" for n in (1, 2, 3) for kind in ("default", "padding")), Convolution()
    ),
    **dict.fromkeys(
        ("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"),
        Transposed(),
    ),
}
"""Operator -> its kind of layer."""


@dataclass(frozen=True)
class Site:
    """One call of a layer.

    Attributes:
        node: The node of the output.
        layer: The kind of layer.
        x: The node of the input.
        weight: The node of the weight, a tensor of the model.
        bias: The node of the bias; None if it has none.
    """

    node: fx.Node
    layer: Layer
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @classmethod
    def of(cls, node: fx.Node, call: Call, program_calls: ProgramCalls) -> Site | None:
        """Return a node as a layer; None if it is no layer, or its weight is no tensor of the model.

        Args:
            node: The node of an operator call.
            call: The call, with the constants that it has after a plan.
            program_calls: The calls of the program.
        """
        layer = LAYERS.get(str(node.target))
        if layer is None:
            return None
        given = call.arguments()
        x, weight = given[layer.x], given[layer.weight]
        bias = given[layer.bias] if layer.bias else None
        usable = isinstance(x, fx.Node) and x not in program_calls.names and program_calls.is_tensor(weight)
        usable = usable and (bias is None or (program_calls.is_tensor(bias) and bias.meta["val"].ndim == 1))
        if not usable or not weight.meta["val"].is_floating_point() or not layer.fits(call):
            return None
        return cls(node, layer, x, weight, bias)

    @cached_property
    def _positions_first(self) -> bool:
        """Whether the input has the axis of positions before that of samples."""
        return positions_come_first(self.x)

    def reads(self, call: Call, weight: Tensor) -> Any:
        """Return a hashable value that is equal for calls with equal columns."""
        named = {self.layer.x, self.layer.weight, self.layer.bias}
        settings = sorted((k, repr(v)) for k, v in call.arguments().items() if k not in named)
        return self.x, self.layer, self.layer.matrix(weight, call).shape[:2], tuple(settings)

    def pieces(
        self, call: Call, weight: Tensor, padding: Padding, *values: Tensor, most: int | None = None
    ) -> Iterator[tuple[Tensor | None, tuple[Tensor, ...]]]:
        """Yield values a few samples at a time, so that the matrix of columns of each piece stays small.

        Args:
            call: The call.
            weight: The weight.
            padding: The padding of the batch.
            values: Values with samples along axis 0. The last one has the shape of the layer's output.
            most: Largest number of positions to take from each sample.

        Returns:
            For each piece: which positions are no padding, bool [samples, positions], or None without
            padding; and the piece of each value.
        """
        positions = self.positions(call, weight, values[-1])
        turned = bool(padding.masks) and self._positions_first
        real = padding.real(len(values[-1]), positions, values[-1].device, turned=turned)
        entries = (positions if most is None else min(positions, most)) * weight[0].numel()
        step = max(1, _CHUNK // max(1, entries))
        parts = zip(*(v.split(step) for v in values), strict=True)
        yield from zip(repeat(None) if real is None else real.split(step), parts, strict=False)

    def draw(
        self,
        call: Call,
        weight: Tensor,
        y: Tensor,
        most: int,
        generator: torch.Generator,
        real: Tensor | None = None,
    ) -> Tensor | None:
        """Choose random positions of each sample, padding last. [samples, most]; None for all positions."""
        positions = self.positions(call, weight, y)
        if positions <= most:
            return None
        drawn = torch.rand(len(y), positions, generator=generator)
        drawn = drawn if real is None else drawn + real.cpu()
        return drawn.topk(most).indices.to(y.device)

    def positions(self, call: Call, weight: Tensor, y: Tensor) -> int:
        """Return the number of positions in a sample of the output."""
        return y[:1].numel() // max(1, self.layer.outputs(weight, call))
