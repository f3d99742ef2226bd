"""Experts in `sc.apply` and `sc.verify`: removed for real, compared with a router that excludes them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from secateur.common.models import device_of, named_tensors, unwrap
from secateur.errors import SettingError, VerificationError
from secateur.graph.graph import fingerprint
from secateur.measure.kernels import with_loop
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.targets.experts.allocate import check_kept
from secateur.targets.experts.counts import new_counts
from secateur.targets.experts.graph import ExpertGraph
from secateur.targets.experts.routing import excluding
from secateur.targets.experts.trace import trace
from secateur.targets.units.compare import relative_difference, require_same, run_doubled
from secateur.targets.units.copying import duplicate
from secateur.targets.units.module_form.module import smaller_module
from secateur.targets.units.record import Record, attach, record_of
from secateur.targets.units.tensors import check_positions

FORMS = ("auto", "module")
"""The forms that a model without some of its experts can have."""

_NORMALISES = "norm_topk_prob"


def apply(
    model: nn.Module,
    plan: Plan,
    form: str = "auto",
    *,
    graph: ExpertGraph | None = None,
    example_inputs: Any = None,
    renormalise: bool | None = None,
) -> nn.Module:
    """A new model without the removed experts, always of form ``module``: see `secateur.apply`.

    Raises:
        PlanError: The plan is for another model, or leaves a router too few experts.
        SettingError: Another form, or `renormalise` is given and a router has no such setting.
    """
    if form not in FORMS:
        raise SettingError(f"apply(form={form!r}): expected one of {', '.join(FORMS)} for experts.")
    model = unwrap(model)
    plan.check(fingerprint(model))
    check_positions(model, plan)
    graph = graph or _traced(model, plan, example_inputs)
    plan.check_graph(graph)
    check_kept(graph, plan)
    sizes = {**new_counts(model, graph, plan), **normalising(model, graph, renormalise)}
    note = "" if renormalise is None else f"renormalise={renormalise}"
    return attach(smaller_module(model, plan, sizes), Record(plan, "module", note, sizes=sizes))


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    graph: ExpertGraph | None = None,
    tolerance: float = 1e-9,
) -> Proof:
    """Compare in float64 with the dense model whose routers may not choose the removed experts.

    No inputs reach all experts. So all tensors are compared too, bit for bit, with the dense model's without
    what was removed.

    Raises:
        VerificationError: The outputs differ by more than `tolerance`, relative to the largest, or a tensor
            differs.
        PlanError: The plan is for another model.
    """
    model = unwrap(model)
    plan.check(fingerprint(model))
    graph = graph or _traced(model, plan, example_inputs)
    args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
    proof = compare_excluding(duplicate(model), small, plan, graph, args, kwargs, tolerance)
    require_same_tensors(model, small, plan)
    return proof


def compare_excluding(
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    graph: ExpertGraph,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tolerance: float,
) -> Proof:
    """Compare a pruned model with another one whose routers may not choose the removed experts.

    Args:
        dense: A copy of the dense model, which is changed.
        small: The pruned model.
        plan: What it lacks of the experts.
        graph: The trace of the dense model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        tolerance: Largest accepted relative difference.

    Raises:
        VerificationError: The outputs differ by more.
    """
    got = run_doubled(with_loop(duplicate(small).double()), args, kwargs)
    dense = with_loop(dense.double())
    for path, value in record_of(small).sizes.items():
        if path.endswith(f".{_NORMALISES}") and not path.startswith("config"):
            setattr(dense.get_submodule(path.rpartition(".")[0]), _NORMALISES, value)
    with ExitStack() as undo:
        for group in plan.groups:
            if group.removed:
                undo.enter_context(excluding(dense, graph.block(group.name), group.removed))
        wanted = run_doubled(dense, args, kwargs)
    difference = relative_difference(got, wanted)
    if not difference <= tolerance:
        raise VerificationError(
            f"verify: expected the pruned {type(dense).__name__} to equal the dense one whose routers "
            f"exclude the removed experts to {tolerance:.1g} relative in float64, got {difference:.3g} over "
            f"{len(wanted)} outputs. Repair and training change what it computes, and so does a forward "
            "pass that draws random numbers: verify what apply returned."
        )
    return Proof(difference, tolerance, "experts excluded", len(wanted))


def require_same_tensors(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Raise VerificationError unless the pruned model holds what the dense one does, without what went."""
    expected, found = (named_tensors(m) for m in (smaller_module(model, plan), unwrap(small)))
    require_same(expected, found, f"dense {type(model).__name__} without the removed experts")


def _traced(model: nn.Module, plan: Plan, example_inputs: Any) -> ExpertGraph:
    args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
    return trace(model, kwargs or args)


def normalising(model: nn.Module, graph: ExpertGraph, renormalise: bool | None) -> dict[str, bool]:
    """Paths of the setting in every router, and in the configuration, with the new value."""
    if renormalise is None:
        return {}
    without = [b.router for b in graph.blocks if not hasattr(model.get_submodule(b.router), _NORMALISES)]
    if without:
        raise SettingError(
            f"apply: expected routers with the setting {_NORMALISES}, got none in {without[0]}. "
            "Leave renormalise out: what this router does is part of its code."
        )
    paths = [f"{block.router}.{_NORMALISES}" for block in graph.blocks]
    if hasattr(getattr(model, "config", None), _NORMALISES):
        paths.append(f"config.{_NORMALISES}")
    return dict.fromkeys(paths, renormalise)
