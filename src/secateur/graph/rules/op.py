"""What a rule sees of one operator call, and what it may say about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from secateur.graph.labels import Labels, LabelStore, Reason, Reasons
from secateur.graph.nodes import arguments_by_name, hint, shape_of, where
from secateur.graph.rules.weights import Weights

Axes = tuple[Labels, ...]
"""The labels of one tensor, an array per axis."""

Value = Axes | list[Any] | None
"""What a node yields: a tensor's axes, a list of values, or None for what is no tensor."""

COMPUTED = "forward computes its weight, so zeros in its parameters do not silence a unit"
"""Why units are mixed by a layer whose weight is ``w + 1`` or ``exp(w)``, of a parameter ``w``."""

PRODUCE, CONSUME = 1, 2
"""Bits of a parameter position's role; neither bit means that the parameter acts elementwise."""


@dataclass(frozen=True)
class Contraction:
    """A sum of products, for counting: MACs = factor x the number of kept positions along each axis."""

    node: str
    factor: int
    axes: tuple[Labels, ...]


@dataclass(frozen=True)
class Produced:
    """The output of a layer with weights: where activations can be observed.

    Attributes:
        node: The output.
        axis: The axis of its units.
        origin: The parameter that the layer's weight is, or is computed from.
    """

    node: fx.Node
    axis: int
    origin: fx.Node


@dataclass(frozen=True)
class Split:
    """An axis that is split in a way its labels do not decide, with trial labels for each resulting axis."""

    key: tuple[str, int]
    sizes: tuple[int, ...]
    trial: tuple[Labels, ...]


@dataclass
class Walk:
    """All that is learnt while the rules walk over the graph.

    `choices` says which axis carries the units where a split leaves that open. In a walk without
    choices the splits are collected, and their axes carry trial labels to see where each leads; where
    two axes of units merge it does not choose between them either, and `unmerged` says so. `written`
    holds the nodes that an operator writes to, themselves or through a view of them.
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


def plain(n: int) -> Labels:
    """An axis that holds no units. [n]"""
    return np.zeros(n, dtype=np.int64)


class Op:
    """One operator call: its arguments by schema name, their labels, and what a rule may say.

    A rule reads labels with `axes` and `shape`, ties or freezes them, and returns the labels of the
    output: a tuple of arrays for a tensor, a list of such tuples for several.
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
        """The positional arguments as they stand."""
        return self.node.args

    def __getitem__(self, name: str) -> Any:
        """The argument of this schema name (a node, a number, a list, ...)."""
        return self._arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument of this schema name, or `default` where the schema has none."""
        value = self._arguments.get(name, default)
        return default if value is None else value

    def integer(self, name: str) -> int:
        """An integer argument, symbolic ones by their hint."""
        return self.integers([self._arguments[name]])[0]

    def integers(self, values: Iterable[Any]) -> list[int]:
        """Integers from constants and symbolic nodes."""
        return [hint(v.meta["val"]) if isinstance(v, fx.Node) else hint(v) for v in values]

    def axes(self, value: Any) -> Axes:
        """The labels of a tensor argument."""
        found = self.walk.values[value]
        if not isinstance(found, tuple):
            raise TypeError(f"{value} is not a tensor")
        return found

    def shape(self, value: Any) -> tuple[int, ...]:
        """The captured shape of a tensor argument."""
        return shape_of(value)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The captured shape of the (only) output."""
        return shape_of(self.node)

    @property
    def reason(self) -> Reason:
        """This operator as a reason, by name and source line."""
        return self.because()

    def because(self, what: str | None = None) -> Reason:
        """This operator, or what it does, as a reason."""
        if self._where is None:
            self._where = where(self.node)
        return Reason(f"{self.name}: {what}" if what else self.name, self._where)

    def tensors(self) -> list[fx.Node]:
        """All tensor arguments, those inside lists too."""
        return [n for n in self.node.all_input_nodes if isinstance(self.walk.values.get(n), tuple)]

    def tie(self, a: Labels, b: Labels) -> None:
        """Say that a[i] and b[i] can only be removed together."""
        self.store.tie(a, b)

    def freeze(self, labels: Labels, what: str | None = None) -> None:
        """Say that `labels` are never removed, because of this operator (or of `what` it does)."""
        self.store.freeze(labels, self.walk.reasons.label(self.because(what)))

    def mix(self, labels: Labels) -> None:
        """Say that this operator mixes the positions of an axis without weights."""
        self.store.mix(labels, self.reason)

    def role(self, labels: Labels, bit: int) -> None:
        """Say what the parameter positions with these labels do (`PRODUCE` or `CONSUME`)."""
        self.walk.roles.append((labels, bit))

    def consumes(self, weight: fx.Node, labels: Labels) -> None:
        """Say that the weight reads the units along its axis with these labels.

        A weight may be computed from parameters. Removing a unit is then exact only if its part of the
        weight is zero where the parameters' is; otherwise this counts as mixing.
        """
        if weight in self.walk.names:
            self.role(labels, CONSUME)
            return
        roots = np.unique(self.store.find(labels[labels > 0]))

        def holding(parameter: fx.Node) -> list[Labels]:
            return [a for a in self.axes(parameter) if np.isin(roots, self.store.find(a)).all()]

        origins = self.walk.weights.vanishing(weight, lambda parameter: bool(holding(parameter)))
        if origins is None:
            self.store.mix(labels, self.because(COMPUTED))
        if origins is not None or self.is_weight(weight):
            self.role(labels, CONSUME)
        for parameter in origins or ():
            axes = holding(parameter)
            own = [a for a in axes if np.isin(a[a > 0], labels).any()]
            for axis in own or axes:
                self.role(axis[np.isin(self.store.find(axis), roots)], CONSUME)

    def produces(self, weight: fx.Node, axis: int) -> None:
        """Say that output axis `axis` of this operator is computed from `weight`."""
        origin = self.walk.weights.origin(weight)
        if origin is not None:
            self.walk.produced.append(Produced(self.node, axis, origin))

    def count(self, factor: int, *axes: Labels) -> None:
        """Count `factor` x the kept positions of each of `axes` as MACs."""
        self.walk.contractions.append(Contraction(self.node.name, factor, axes))

    def is_weight(self, value: Any) -> bool:
        """True if the argument is computed from parameters and buffers alone."""
        return value in self.walk.weights.computed

    def operand_weights(self, operands: Sequence[fx.Node]) -> list[int]:
        """Which operands of a product are weights, by number; none if all are.

        Where none is computed from parameters alone, a part of one that the data choose is a weight too:
        the matrix of the expert that a token goes to, for example.
        """
        for kind in (self.walk.weights.computed, self.walk.weights.chosen):
            found = [k for k, operand in enumerate(operands) if operand in kind]
            if found:
                return found if len(found) < len(operands) else []
        return []

    def broadcast(self, *operands: Axes) -> Axes:
        """Tie the axes of operands that broadcast against each other; returns the result's labels."""
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
        """The only axis of the shape `sizes` along which the flat `labels` vary; None if there is none."""
        grid = self.store.find(labels).reshape(sizes)
        for axis in sorted(range(len(sizes)), key=lambda k: (-sizes[k], -k)):
            lines = np.moveaxis(grid, axis, 0).reshape(sizes[axis], -1)
            if (lines == lines[:, :1]).all():
                return axis
        return None

    def carry(self, labels: Labels, sizes: Sequence[int], axis: int) -> Labels:
        """Let one axis of the shape `sizes` carry the flat `labels`; positions along the others are tied."""
        lines = np.moveaxis(labels.reshape(sizes), axis, 0).reshape(sizes[axis], -1)
        first = np.ascontiguousarray(lines[:, 0])
        self.tie(first[:, None], lines[:, 1:])
        return first


def product(sizes: Iterable[int]) -> int:
    """The product of sizes, 1 for none."""
    return math.prod(sizes)
