"""`sc.apply`: a plan and a model in, a new model out."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from secateur.apply.compare import relative_difference, run
from secateur.apply.masked import masked
from secateur.apply.module import smaller_module
from secateur.apply.program import smaller_program
from secateur.apply.record import Record, attach
from secateur.apply.sizes import SizeChanges
from secateur.errors import ApplyError, SettingError
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.inputs import call_arguments
from secateur.graph.trace import trace, unwrap
from secateur.plan import Plan

FORMS = ("auto", "module", "graph", "masked")

SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative difference below which two forms count as equal; they may sum in another order."""


def apply(
    model: nn.Module,
    plan: Plan,
    form: Literal["auto", "module", "graph", "masked"] = "auto",
    *,
    example_inputs: Any = None,
    graph: Graph | None = None,
) -> nn.Module:
    """Remove what a plan says.

    Args:
        model: The dense model; it is left as it was.
        plan: The decision, made for a model with the same tensors.
        form: ``module``: the same classes with smaller tensors, proven against form ``graph`` by a
            forward pass. ``graph``: the captured program, which exists for every plan. ``masked``: the
            dense model with what consumes the removed units zeroed. ``auto``: a module where that
            proof succeeds, else the program; `secateur.record_of(result).note` then says why.
        example_inputs: Inputs for the forward pass; made from the plan's shapes if not given.
        graph: The trace of this model, if at hand; it saves tracing again.

    Returns:
        A new model in the dense one's training mode.

    Raises:
        PlanError: If the plan was made for another model.
        ApplyError: If the model cannot take the form asked for.
        SettingError: If `form` is unknown.
    """
    if form not in FORMS:
        raise SettingError(f"apply(form={form!r}): expected one of {', '.join(FORMS)}.")
    model = unwrap(model)
    plan.check(fingerprint(model))
    if form == "masked":
        return attach(masked(model, plan), Record(plan, "masked"))
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    if example_inputs is None:
        args, kwargs = plan.inputs.example(device=device)
    else:
        args, kwargs = call_arguments(example_inputs, device)
    if graph is None:
        exact = all(g.exact for g in plan.groups)
        graph = trace(model, (*args,) if not kwargs else kwargs, allow_inexact=not exact)
    program, changes = smaller_program(model, graph, plan)
    if form == "graph":
        return attach(program, Record(plan, "graph"))
    try:
        return _proven_module(model, plan, program, changes, args, kwargs)
    except ApplyError as error:
        if form == "module":
            raise
        return attach(program, Record(plan, "graph", str(error)))


def _proven_module(
    model: nn.Module,
    plan: Plan,
    program: nn.Module,
    changes: SizeChanges,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> nn.Module:
    """The smaller module, if it computes what the program does; ApplyError otherwise."""
    errors: list[ApplyError] = []
    expected = run(program, args, kwargs)
    for sizes in changes.guesses(model):
        small = smaller_module(model, plan, sizes)
        try:
            _prove(small, expected, args, kwargs)
        except ApplyError as error:
            errors.append(error)
        else:
            return attach(small, Record(plan, "module", sizes=sizes))
    raise errors[0]


def _prove(
    small: nn.Module, expected: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
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
