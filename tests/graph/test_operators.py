"""Every operator with units along every axis of every operand: pruned equals masked, or they stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import secateur as sc
from secateur.compat.operators import made_of
from secateur.graph.rules import RULES, find_rule, operator_name
from secateur.targets.units.apply import Applier
from secateur.targets.units.compare import relative_difference, run
from tests.graph.operators import CALLS, Call, Operand
from tests.targets.units.plans import random_plan

ELSEWHERE = {
    "pointwise",  # all operators of its kind: see `test_what_acts_position_by_position`
    "operator.getitem",
    "aten._grouped_mm.default",  # knows no float64: see `tests.graph.test_chosen_weights`
    "transformers.grouped_mm_fallback.default",
}
"""Rules without a call of their own."""

NUMBERS = 60_000
"""Length of the input."""

Live = frozenset[tuple[int, int]]
"""Operands and axes of these that hold units."""


@dataclass(frozen=True)
class Case:
    """A call, and where it meets units; `activations` says that weights are computed from the input."""

    call: Call
    live: Live
    activations: bool

    def is_weight(self, operand: Operand) -> bool:
        return operand.kind == "w" and not self.activations


class Noise:
    """Pieces of one long input, so that all a model reads comes from one tensor of a fixed size."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.start = numbers, 0

    def take(self, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        self.start += count
        return self.numbers[self.start - count : self.start].reshape(list(shape))


class Source(nn.Module):
    """A tensor with units along the given axes: a linear layer for each, times a tensor from the input."""

    def __init__(self, shape: tuple[int, ...], axes: list[int]) -> None:
        super().__init__()
        self.shape, self.axes = shape, axes
        self.layers = nn.ModuleList(nn.Linear(7, shape[k]) for k in axes)

    def forward(self, noise: Noise) -> Tensor:
        y = noise.take([1 if k in self.axes else n for k, n in enumerate(self.shape)])
        for k, layer in zip(self.axes, self.layers, strict=True):
            y = y * layer(noise.take([7])).reshape([-1 if k == j else 1 for j in range(len(self.shape))])
        return y


class Readers(nn.Module):
    """A linear layer along every axis of a tensor."""

    def __init__(self, shape: tuple[int, ...], summed: tuple[int, ...]) -> None:
        super().__init__()
        self.summed = summed
        self.layers = nn.ModuleList(nn.Linear(n, 2) for k, n in enumerate(shape) if k not in summed)

    def forward(self, y: Tensor) -> Tensor:
        if self.summed:
            y = y.sum(self.summed)
        for k, layer in enumerate(self.layers):
            y = layer(y.movedim(k, -1)).movedim(-1, k)
        return y


def reals(y: Any) -> list[Tensor]:
    """The tensors that an operator returned, as real numbers."""
    found = y if isinstance(y, tuple | list) else [y]
    found = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
    return [t if t.is_floating_point() else t.double() for t in found]


class Around(nn.Module):
    """One call between layers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.sources, self.weights = nn.ModuleDict(), nn.ParameterDict()
        for number, operand in enumerate(case.call.operands):
            axes = [k for n, k in sorted(case.live) if n == number]
            if case.is_weight(operand):
                self.weights[str(number)] = nn.Parameter(torch.randn(operand.shape))
            elif operand.kind in "xwc":
                self.sources[str(number)] = Source(operand.shape, axes)
        self.double()
        with torch.no_grad():
            results = reals(self.call(Noise(torch.randn(NUMBERS).double())))
        self.read = [k for k, y in enumerate(results) if y.numel()]
        readers = [Readers(tuple(results[k].shape), case.call.summed) for k in self.read]
        self.readers = nn.ModuleList(readers).double()

    def call(self, noise: Noise) -> Any:
        operands = []
        for number, operand in enumerate(self.case.call.operands):
            if str(number) in self.weights:
                value = self.weights[str(number)]
            elif str(number) in self.sources:
                value = self.sources[str(number)](noise)
                value = torch.complex(value, -value) if operand.kind == "c" else value
            else:
                value = noise.take(operand.shape)
                value = (value * 100).long() % operand.high if operand.kind == "i" else value > 0
            operands.append(value)
        return self.case.call.function(*operands)

    def forward(self, noise: Noise) -> list[Tensor]:
        ys = reals(self.call(noise))
        return [reader(ys[k]) for reader, k in zip(self.readers, self.read, strict=True)]


class Together(nn.Module):
    """Several cases in one model, so that they are captured at once."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Around(case) for case in cases)

    def forward(self, numbers: Tensor) -> list[list[Tensor]]:
        noise = Noise(numbers.view(NUMBERS))
        return [part(noise) for part in self.parts]


def cases(call: Call) -> list[Case]:
    """Units along each axis of each operand alone, along all axes of one, and along all of all."""
    found = []
    for activations in {False, any(o.kind == "w" for o in call.operands)}:
        own = [
            (n, o) for n, o in enumerate(call.operands)
            if o.kind in "xc" or (activations and o.kind == "w")
        ]  # fmt: skip
        single = [frozenset({(n, k)}) for n, o in own for k, size in enumerate(o.shape) if size > 1]
        whole = [frozenset((n, k) for k, size in enumerate(o.shape) if size > 1) for n, o in own]
        every = frozenset().union(*whole)
        found += [Case(call, live, activations) for live in dict.fromkeys([*single, *whole, every]) if live]
    return found


def overload(name: str) -> Any:
    _, packet, kind = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), kind)


def is_decomposed(name: str) -> bool:
    """Whether an operator has no rule, so that others have to take its place."""
    return find_rule(fx.Graph().call_function(overload(name))) is None


def test_every_rule_has_a_call() -> None:
    assert set(RULES) - set(CALLS) <= ELSEWHERE
    bases = {name.split(".")[1] for name in set(CALLS) - set(RULES) if not is_decomposed(name)}
    assert bases == set("relu gelu sigmoid neg add mul atan2 where square arctan frexp".split())
    composed = list(filter(is_decomposed, CALLS))
    assert composed
    assert all(made_of(overload(name))[0] is not None for name in composed)


def open_axes(model: Together, graph: sc.Graph | None) -> str:
    """For every operand of a call a letter an axis: ``o`` where units may go, ``-`` where they stay.

    Operands are divided by spaces. Units lie along that one axis alone; ``.``: not tried.
    """
    produced = {piece.tensor for group in (graph.groups if graph else ()) for piece in group.slices}
    found = [["."] * len(operand.shape) for operand in model.parts[0].case.call.operands]
    for number, part in enumerate(model.parts):
        if len(part.case.live) == 1:
            ((operand, axis),) = part.case.live
            if part.case.activations == (part.case.call.operands[operand].kind == "w"):
                prunable = f"parts.{number}.sources.{operand}.layers.0.weight" in produced
                found[operand][axis] = "o" if prunable else "-"
    return " ".join("".join(axes) for axes in found)


def expected_axes() -> dict[str, str]:
    """What `open_axes` is to say, by operator: for each of its calls, between bars."""
    lines = (Path(__file__).parent / "operator_axes.txt").read_text().splitlines()
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}


def test_every_operator_says_along_which_axes_units_pass() -> None:
    assert set(expected_axes()) >= set(CALLS)


LONG = ("conv", "lstm", "gru", "rnn", "attention")
"""Parts of names of operators that take longest; topologies have them all."""
QUICK = {name for name in sorted(CALLS)[4::9] if not any(part in name for part in LONG)}
"""Operators that `make test` tries too; the others are slow together."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CALLS]
)
def test_pruned_equals_masked(name: str) -> None:
    found = [checked(call, name) for call in CALLS[name]]
    assert " | ".join(found) == expected_axes()[name]


def checked(call: Call, name: str) -> str:
    """Prunes a model of all cases of one call in every form, and says along which axes units may go."""
    torch.manual_seed(0)
    model = Together(cases(call)).eval()
    inputs = (torch.randn(NUMBERS).double(),)
    try:
        graph = sc.trace(model, inputs)
    except sc.NothingToPruneError:
        return open_axes(model, None)
    apply = Applier(model, graph)
    for seed in range(2):
        plan = random_plan(graph, 0.5, seed)
        wanted = run(apply(plan, "masked"), inputs, {})
        assert relative_difference(run(apply(plan, "graph"), inputs, {}), wanted) <= 1e-9
        assert relative_difference(run(apply(plan), inputs, {}), wanted) <= 1e-9
    assert (name in {operator_name(node) for node in graph.program.graph.nodes}) is not is_decomposed(name)
    return open_axes(model, graph)
