"""What a rule sees of one operator call, and how it says what belongs together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from secateur.graph.labels import Labels, LabelStore, Reason, Reasons
from secateur.graph.nodes import arguments_by_name, hint, shape_of, where
from secateur.graph.rules.silence import silenced
from secateur.graph.rules.weights import Weights

Axes = tuple[Labels, ...]
"""The labels of one tensor: an array for each axis."""

Value = Axes | list[Any] | None
"""The labels of what a node gives: of a tensor, of each of several outputs, or None for anything else."""

COMPUTED = "forward computes its weight, so zeros in its parameters do not make a unit zero"
"""Why a layer mixes units if its weight is ``w + 1`` or ``exp(w)`` of a parameter ``w``."""

UNSILENCED = "sums products of activations that zeros in the weights of a unit do not silence"
"""Why a product of activations mixes units, for example behind a norm that is not zero at zero."""

PRODUCE, CONSUME, MATCH = 1, 2, 4
"""Bits that say what a position of a parameter does. With none of them it scales or shifts a unit. `MATCH`
comes with `PRODUCE`, where a product of activations reads the unit."""


@dataclass(frozen=True)
class Contraction:
    """A sum of products. It costs `factor` times the number of kept positions along each axis. [MACs]"""

    node: str
    factor: int
    axes: tuple[Labels, ...]


@dataclass(frozen=True)
class Produced:
    """The output of a layer with weights, where activations can be observed.

    Attributes:
        node: The output.
        axis: The axis of its units.
        origin: The parameter that is the layer's weight, or that the weight is computed from.
    """

    node: fx.Node
    axis: int
    origin: fx.Node


@dataclass(frozen=True)
class Split:
    """An axis that is split into several, any of which could carry its units.

    Attributes:
        key: The name of the node, and the number of its first new axis.
        sizes: The sizes of the new axes.
        trial: Labels for each new axis, which show what the operators behind it do with that axis.
    """

    key: tuple[str, int]
    sizes: tuple[int, ...]
    trial: tuple[Labels, ...]


@dataclass
class Walk:
    """All that the rules say about one captured program.

    The first walk over a program has no `choices`. It collects the splits that labels alone do not decide.
    A second walk then knows from the first which axis carries the units.

    Attributes:
        choices: For each split, by its key, the number of the axis that carries the units. None in the first
            walk.
        splits: The splits that the first walk met.
        unmerged: Whether the first walk met two axes with units that merge. It decides on neither.
        store: The labels, and which of them are tied, frozen or mixed.
        reasons: Why labels are frozen.
        values: The labels of what each node gives.
        roles: Labels of parameters, with what their positions do: `PRODUCE` or `CONSUME`.
        contractions: The sums of products, which cost MACs.
        produced: The outputs of layers with weights.
        weights: Which nodes are weights, and the parameters they are computed from.
        names: The name of the parameter, buffer or constant that each placeholder stands for.
        constants: The values of nodes that are known without data.
        written: Nodes that an operator writes to, directly or through a view.
        head_sizes: Whether the dimensions of attention heads carry units, in place of the heads.
        sized: The splits, by key, of which the chosen axis is the size of attention heads, if `head_sizes`.
        matched: Labels that a product of two activations sums over, such as q k^T, if `head_sizes`.
        dimensions: Labels of the dimensions of attention heads, if `head_sizes`.
    """

    choices: dict[tuple[str, int], int] | None = None
    splits: list[Split] = field(default_factory=list)
    unmerged: bool = False

    store: LabelStore = field(default_factory=LabelStore)
    reasons: Reasons = field(default_factory=Reasons)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    roles: list[tuple[Labels, int]] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    produced: list[Produced] = field(default_factory=list)
    weights: Weights = field(default_factory=Weights)
    names: dict[fx.Node, str] = field(default_factory=dict)
    constants: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    written: frozenset[fx.Node] = frozenset()
    head_sizes: bool = False
    sized: frozenset[tuple[str, int]] = frozenset()
    matched: list[Labels] = field(default_factory=list)
    dimensions: list[Labels] = field(default_factory=list)

    def for_other_program(self) -> Walk:
        """Return a walk over another program of the model, with the same labels, roles and reasons."""
        return Walk(
            self.choices or {},
            store=self.store,
            reasons=self.reasons,
            roles=self.roles,
            head_sizes=self.head_sizes,
            sized=self.sized,
            matched=self.matched,
            dimensions=self.dimensions,
        )


def plain(n: int) -> Labels:
    """Return the labels of an axis that holds no units. [n]"""
    return np.zeros(n, dtype=np.int64)


class Op:
    """One operator call: its arguments, their labels, and what a rule may say about them.

    A rule reads the labels of arguments with `axes`. It says what belongs together, with `tie`, `freeze`,
    `mix`, `consumes` and `produces`. Then it returns the labels of the output: a tuple of arrays for a
    tensor, a list of such tuples for several outputs.
    """

    def __init__(self, node: fx.Node, walk: Walk) -> None:
        self.node = node
        self.walk = walk
        self.store = walk.store
        self.name = str(node.target)
        self._arguments = arguments_by_name(node)
        self._where: str | None = None

    @property
    def positional(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return self.node.args

    def __getitem__(self, name: str) -> Any:
        """The argument with this name in the operator's schema: a node, a number, a list and so on."""
        return self._arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument with this name, or `default` if there is none or it is None."""
        value = self._arguments.get(name, default)
        return default if value is None else value

    @property
    def is_computed(self) -> bool:
        """Whether a number among the arguments behind the first is computed, from sizes or values."""
        given = pytree.tree_leaves((self.node.args[1:], self.node.kwargs))
        return any(isinstance(value, fx.Node) for value in given)

    def integer(self, name: str) -> int:
        """An integer argument. A symbolic one has its value in the capture."""
        return self.integers([self._arguments[name]])[0]

    def integers(self, values: Iterable[Any]) -> list[int]:
        """Convert numbers and nodes to integers. Symbolic ones have their value in the capture."""
        return [hint(v.meta["val"]) if isinstance(v, fx.Node) else hint(v) for v in values]

    def axes(self, value: Any) -> Axes:
        """The labels of a tensor argument."""
        found = self.walk.values[value]
        if not isinstance(found, tuple):
            raise TypeError(f"{value} is not a tensor")
        return found

    def for_each_output(self, axes: Axes) -> Axes | list[Axes]:
        """The same labels for each output, where the operator returns several."""
        value = self.node.meta["val"]
        return [axes for _ in value] if isinstance(value, list | tuple) else axes

    def shape(self, value: Any) -> tuple[int, ...]:
        """The shape of a tensor argument in the capture."""
        return shape_of(value)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the output in the capture, if it is a single tensor."""
        return shape_of(self.node)

    @property
    def reason(self) -> Reason:
        """A reason that names this operator and its source line."""
        return self.because()

    def because(self, what: str | None = None) -> Reason:
        """A reason that names this operator, what it does, and its source line."""
        if self._where is None:
            self._where = where(self.node)
        return Reason(f"{self.name}: {what}" if what else self.name, self._where)

    def tensors(self) -> list[fx.Node]:
        """All tensor arguments, also those inside lists."""
        return [n for n in self.node.all_input_nodes if isinstance(self.walk.values.get(n), tuple)]

    def tie(self, a: Labels, b: Labels) -> None:
        """Say that a[i] and b[i] can only be removed together."""
        self.store.tie(a, b)

    def freeze(self, labels: Labels, what: str | None = None) -> None:
        """Say that positions are never removed, because of this operator, or of `what` it does."""
        self.store.freeze(labels, self.walk.reasons.label(self.because(what)))

    def mix(self, labels: Labels) -> None:
        """Say that this operator mixes the positions of an axis without weights."""
        self.store.mix(labels, self.reason)

    def match(self, labels: Labels, operands: Sequence[fx.Node]) -> None:
        """Say that a product of activations sums over positions, as q k^T does over the size of a head.

        A unit whose producers are zero adds nothing to the sum if one of the operands is zero there too.
        Otherwise, and unless the dimensions of heads carry units, the product mixes the positions.
        """
        if not self.walk.head_sizes:
            self.mix(labels)
            return
        self.walk.matched.append(labels)
        self.walk.dimensions.append(labels)
        is_first_walk = self.walk.choices is None  # the axes of splits still have trial labels
        if not is_first_walk and not any(silenced(self.walk, operand, labels) for operand in operands):
            self.store.mix(labels, self.because(UNSILENCED))

    def role(self, labels: Labels, bit: int) -> None:
        """Say what positions of parameters do: `PRODUCE` or `CONSUME`."""
        self.walk.roles.append((labels, bit))

    def consumes(self, weight: fx.Node, labels: Labels) -> None:
        """Say that a weight reads units along its axis with these labels.

        The weight may be computed from parameters. A unit can then be removed without changing the others
        only if zeros in its part of the parameters make zeros in its part of the weight. Otherwise the weight
        mixes the units.
        """
        if weight in self.walk.names:
            self.role(labels, CONSUME)
            return
        roots = np.unique(self.store.find(labels[labels > 0]))

        # The units lie along those axes of a parameter that have all of them.
        def axes_with_all(parameter: fx.Node) -> list[Labels]:
            return [a for a in self.axes(parameter) if np.isin(roots, self.store.find(a)).all()]

        origins = self.walk.weights.vanishing(weight, lambda parameter: bool(axes_with_all(parameter)))
        if origins is None:
            self.store.mix(labels, self.because(COMPUTED))
        if origins is not None or self.is_weight(weight):
            self.role(labels, CONSUME)
        origins = origins or []
        for parameter in origins:
            axes = axes_with_all(parameter)
            # A square parameter can have the same units along both axes. The one with these labels reads, and
            # both read where the weight is a sum of several parts of the parameter, as in ``w - w.T``.
            own = [a for a in axes if np.isin(a[a > 0], labels).any() and origins.count(parameter) == 1]
            for axis in own or axes:
                self.role(axis[np.isin(self.store.find(axis), roots)], CONSUME)

    def produces(self, weight: fx.Node, axis: int) -> None:
        """Say that the units along axis `axis` of the output are produced by `weight`."""
        origin = self.walk.weights.origin(weight)
        if origin is not None:
            self.walk.produced.append(Produced(self.node, axis, origin))

    def count(self, factor: int, *axes: Labels) -> None:
        """Count MACs: `factor` times the number of kept positions along each of `axes`."""
        self.walk.contractions.append(Contraction(self.node.name, factor, axes))

    def is_weight(self, value: Any) -> bool:
        """Whether an argument is computed from parameters, buffers and constants alone."""
        return value in self.walk.weights.computed

    def operand_weights(self, operands: Sequence[fx.Node]) -> list[int]:
        """Return the numbers of the operands of a product that are weights; none if all of them are.

        If no operand is computed from parameters alone, a part of a parameter that the data choose counts as
        a weight: for example the matrix of the expert that a token is sent to.
        """
        for kind in (self.walk.weights.computed, self.walk.weights.chosen):
            found = [k for k, operand in enumerate(operands) if operand in kind]
            if found:
                return found if len(found) < len(operands) else []
        return []

    def broadcast(self, *operands: Axes) -> Axes:
        """Tie the axes of operands that broadcast against each other, and return the labels of the result."""
        rank = max((len(axes) for axes in operands), default=0)
        result: list[Labels] = []
        for k in range(rank):
            column = [axes[k - rank + len(axes)] for axes in operands if k - rank + len(axes) >= 0]
            size = max((len(c) for c in column if len(c) != 1), default=1)
            if any(len(c) == 0 for c in column):
                size = 0
            full = [c for c in column if len(c) == size]
            merged = full[0]
            for other in full[1:]:
                self.tie(merged, other)
                merged = np.where(merged > 0, merged, np.where(other > 0, other, np.minimum(merged, other)))
            result.append(merged)
        return tuple(result)

    def vary_along(self, labels: Labels, sizes: Sequence[int]) -> int | None:
        """Return the axis of the shape `sizes` along which flat `labels` vary; None if there are several."""
        grid = self.store.find(labels).reshape(sizes)
        for axis in sorted(range(len(sizes)), key=lambda k: (-sizes[k], -k)):
            lines = np.moveaxis(grid, axis, 0).reshape(sizes[axis], -1)
            if (lines == lines[:, :1]).all():
                return axis
        return None

    def carry(self, labels: Labels, sizes: Sequence[int], axis: int) -> Labels:
        """Let one axis of the shape `sizes` carry flat `labels`, and return the labels of that axis.

        Positions that share an index along that axis are tied: they become one unit.
        """
        lines = np.moveaxis(labels.reshape(sizes), axis, 0).reshape(sizes[axis], -1)
        first = np.ascontiguousarray(lines[:, 0])
        self.tie(first[:, None], lines[:, 1:])
        return first


def product(sizes: Iterable[int]) -> int:
    """Multiply sizes; 1 if there are none."""
    return math.prod(sizes)
