"""Units and experts in `sc.apply` and `sc.verify`: units go first, then experts of what is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import nn

from secateur.common.models import device_of, unwrap
from secateur.errors import SettingError
from secateur.graph.folding import folded
from secateur.graph.graph import fingerprint
from secateur.group_decision import SliceDecision
from secateur.plan import Plan
from secateur.proof.verify import Proof, argument_sets
from secateur.proof.verify import verify as verify_units
from secateur.targets.experts.allocate import check_kept
from secateur.targets.experts.apply import FORMS, compare_excluding, normalising, require_same_tensors
from secateur.targets.experts.counts import new_counts
from secateur.targets.together.graph import Joined, part, trace
from secateur.targets.units.apply import apply as apply_units
from secateur.targets.units.compare import run_in_double
from secateur.targets.units.masked import masked
from secateur.targets.units.module_form.module import smaller_module
from secateur.targets.units.module_form.sizes import Sizes
from secateur.targets.units.module_form.unrealisable import restricted
from secateur.targets.units.record import attach, record_of
from secateur.targets.units.tensors import check_positions, tensor_called


def apply(
    model: nn.Module,
    plan: Plan,
    form: str = "auto",
    *,
    graph: Joined | None = None,
    example_inputs: Any = None,
    on_unrealisable: Literal["graph", "leave"] = "graph",
    renormalise: bool | None = None,
) -> nn.Module:
    """A new model without the removed units and experts, always of form ``module``: see `secateur.apply`.

    Raises:
        PlanError: The plan is for another model, or leaves a router too few experts.
        ApplyError: A module cannot express what the plan removes, and `on_unrealisable` is not ``leave``.
        SettingError: Another form, or `renormalise` is given and a router has no such setting.
    """
    if form not in FORMS:
        raise SettingError(
            f"apply(form={form!r}): expected one of {', '.join(FORMS)} for units and experts together."
        )
    model = unwrap(model)
    plan.check(fingerprint(model))
    check_positions(folded(model, plan.folded), plan)
    graph = graph or _traced(model, plan, example_inputs)
    check_kept(graph.others, part(plan, "expert"))
    small = without_units(model, plan, graph, example_inputs, on_unrealisable)
    return without_experts(small, model, plan, graph, renormalise)


def without_units(
    model: nn.Module,
    plan: Plan,
    graph: Joined,
    example_inputs: Any = None,
    on_unrealisable: Literal["graph", "leave"] = "graph",
) -> nn.Module:
    """The model without the plan's units; its record has a plan of units alone."""
    plan.check_graph(graph)
    plan = plan.model_copy().of_graph()  # its parts have the costs of the whole
    return apply_units(
        model,
        part(plan, "unit"),
        "auto" if on_unrealisable == "leave" else "module",
        graph=graph.units,
        example_inputs=example_inputs,
        on_unrealisable="leave",
    )


def without_experts(
    small: nn.Module,
    model: nn.Module,
    plan: Plan,
    graph: Joined,
    renormalise: bool | None = None,
) -> nn.Module:
    """The same model without the plan's experts.

    Args:
        small: What `without_units` made, which may be repaired since.
        model: The dense model.
        plan: The whole plan. Groups that `small` left whole are whole in the plan of the result.
        graph: The trace of the dense model.
        renormalise: As for `apply`.
    """
    done = record_of(small)
    names = {group.name for group in done.plan.groups if group.removed}
    left = [g.name for g in part(plan, "unit").groups if g.removed and g.name not in names]
    if left:
        costed: Any = graph  # as if it were one of units
        plan = restricted(plan, costed, [group.name for group in plan.groups if group.name not in left])
    experts = part(plan, "expert")
    sizes = {**new_counts(model, graph.others, experts), **normalising(model, graph.others, renormalise)}
    note = "" if renormalise is None else f"renormalise={renormalise}"
    found = replace(
        done, plan=plan, sizes={**done.sizes, **sizes}, note=" ".join(filter(None, (done.note, note)))
    )
    return attach(cut_experts(small, folded(model, plan.folded), plan, sizes), found)


def cut_experts(small: nn.Module, dense: nn.Module, plan: Plan, sizes: Sizes) -> nn.Module:
    """A copy of a model without the plan's experts, of which the plan's units are gone already.

    Args:
        small: The model without the units.
        dense: The dense model, whose positions the plan counts.
        plan: The plan for both.
        sizes: Attributes that say how many experts there are, with their new values.
    """

    def now(piece: SliceDecision) -> SliceDecision:
        """An expert that has a tensor of its own loses all of it, however long that is by now."""
        whole = len(piece.removed) == tensor_called(dense, piece.tensor).shape[piece.axis]
        size = tensor_called(small, piece.tensor).shape[piece.axis]
        return piece.model_copy(update={"removed": tuple(range(size))}) if whole else piece

    experts = part(plan, "expert")
    groups = [g.model_copy(update={"slices": tuple(map(now, g.slices))}) for g in experts.groups]
    return smaller_module(small, experts.model_copy(update={"groups": tuple(groups)}), sizes)


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    graph: Joined | None = None,
    other_sizes: bool = True,
    tolerance: float = 1e-9,
) -> Proof:
    """Compare in float64 with the masked dense model whose routers may not choose the removed experts.

    First the units alone are removed, and that model is compared as `secateur.verify` does for units, at
    every size. Then the pruned model is compared with the masked one without the experts, at the same sizes,
    and all its tensors, bit for bit, with those of the dense model without what was removed.

    Raises:
        VerificationError: One of these differs.
        PlanError: The plan is for another model.
    """
    model = unwrap(model)
    plan.check(fingerprint(model))
    graph = graph or _traced(model, plan, example_inputs)
    units = part(plan, "unit")
    proof = verify_units(
        model,
        without_units(model, plan, graph, example_inputs),
        units,
        example_inputs,
        other_sizes=other_sizes,
        tolerance=tolerance,
    )
    dense = folded(model, plan.folded)
    reference, experts, difference = masked(dense, units), part(plan, "expert"), proof.difference
    for options in argument_sets(plan.inputs, example_inputs, device_of(model), other_sizes=other_sizes):
        for _, args, kwargs in options:
            try:
                run_in_double(reference, args, kwargs)
            except Exception:  # what the dense model refuses says nothing: the next one may
                continue
            found = compare_excluding(reference, small, experts, graph.others, args, kwargs, tolerance)
            difference = max(difference, found.difference)
            break
    require_same_tensors(dense, small, plan)
    return replace(proof, difference=difference, reference="masked, experts excluded")


def _traced(model: nn.Module, plan: Plan, example_inputs: Any) -> Joined:
    args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
    return trace(model, kwargs or args)
