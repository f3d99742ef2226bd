"""Which groups a smaller module can express, and which need the captured program."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.apply.compare import relative_difference, run
from secateur.apply.constants import changed_sizes
from secateur.apply.copying import duplicate
from secateur.apply.metadata import new_metadata
from secateur.apply.module import smaller_module
from secateur.apply.program import smaller_program
from secateur.apply.record import Record, attach
from secateur.apply.sizes import set_sizes
from secateur.errors import ApplyError
from secateur.graph.graph import Graph
from secateur.plan import Plan

SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative difference below which two forms count as equal; they may sum in another order."""


def proven_module(
    model: nn.Module, graph: Graph, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> nn.Module:
    """The smaller module, once a forward pass has shown that it computes what the sliced program does.

    Raises:
        ApplyError: If no reading of the size attributes gives such a module.
    """
    program, changes = smaller_program(model, graph, plan)
    expected = run(program, args, kwargs)
    first: ApplyError | None = None
    for sizes in changes.guesses(model):
        try:
            small = smaller_module(model, plan, sizes)
            _prove(small, expected, args, kwargs)
        except ApplyError as error:
            first = first or error
        else:
            slots = graph.keep_slots(plan.keep)
            metadata = new_metadata(model, small, graph, slots)
            set_sizes(model, small, metadata)
            return attach(small, Record(plan, "module", sizes={**sizes, **metadata}))
    raise first or ApplyError("apply: expected a reading of the size attributes, got none.")


def _prove(
    small: nn.Module, expected: list[torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise ApplyError unless the module gives the expected outputs."""
    try:
        got = run(small, args, kwargs)
    except Exception as error:  # the user's forward may fail in any way once shapes have changed
        raise ApplyError(
            f"apply: the smaller module's forward pass failed ({type(error).__name__}: {error}), "
            f"most likely because the code holds a size that does not follow its tensors. Use form='graph', "
            f"or leave the group alone."
        ) from error
    tolerance = max((SAME.get(t.dtype, 1e-3) for t in expected), default=0.0)
    difference = relative_difference(got, expected)
    if not difference <= tolerance:
        raise ApplyError(
            f"apply: expected the smaller module to compute what the sliced program computes, got a relative "
            f"difference of {difference:.2g}. Its code uses a size that has changed. Use form='graph'."
        )


def unrealisable(
    model: nn.Module, graph: Graph, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """The pruned groups of a plan that a smaller module cannot express, by halving the set of groups.

    Shapes alone are tried first, on tensors without data, which finds nearly all of them at little cost;
    what is left is then proven with numbers.
    """
    pruned = [g.name for g in plan.groups if g.removed]
    failed = _failing(pruned, _by_shape(model, graph, plan, args, kwargs))
    left = [name for name in pruned if name not in failed]

    def by_value(names: list[str]) -> bool:
        try:
            proven_module(model, graph, restricted(plan, graph, names), args, kwargs)
        except ApplyError:
            return False
        return True

    failed += _failing(left, by_value)
    return tuple(name for name in pruned if name in failed)


def restricted(plan: Plan, graph: Graph, names: list[str]) -> Plan:
    """The same plan with all groups but these left whole."""
    return Plan.build(
        graph,
        {g.name: g.keep for g in plan.groups if g.name in names},
        allocator=plan.allocator,
        settings=plan.settings,
        seed=plan.seed,
        budget=plan.budget,
        certificates=plan.certificates,
    )


def _failing(names: list[str], works: Callable[[list[str]], bool]) -> list[str]:
    """Members without which `works` is true, by halving; each is judged in the company of its half."""
    if not names or works(names):
        return []
    if len(names) == 1:
        return names
    parts = 2 if len(names) > 4 else len(names)
    cuts = [len(names) * k // parts for k in range(parts + 1)]
    failed = [n for a, b in itertools.pairwise(cuts) for n in _failing(names[a:b], works)]
    left = [name for name in names if name not in failed]
    # Two halves may work alone and fail together.
    return failed if works(left) else failed + left


def _by_shape(
    model: nn.Module, graph: Graph, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[list[str]], bool]:
    """Whether the module runs without data when only these groups are pruned; yes if that cannot be said."""
    try:
        shapes = duplicate(model).to("meta")
        args, kwargs = pytree.tree_map(
            lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, (args, dict(kwargs))
        )
        run(shapes, args, kwargs)
    except Exception:  # a model that looks at values cannot run without them
        return lambda names: True

    def works(names: list[str]) -> bool:
        part = restricted(plan, graph, names)
        for sizes in changed_sizes(graph, part).guesses(shapes):
            try:
                run(smaller_module(shapes, part, sizes), args, kwargs)
            except Exception:  # any failure of the user's code means that this reading does not fit
                continue
            return True
        return False

    return works
