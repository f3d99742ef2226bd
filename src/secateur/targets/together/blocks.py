"""Units and blocks in `sc.trace`, `sc.apply`, `sc.verify` and `sc.repair`: blocks go first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import nn

from secateur.calibration import Calibration, Forward
from secateur.common.models import device_of, unwrap
from secateur.errors import ApplyError, SettingError
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.trace import retrace
from secateur.graph.trace import trace as trace_units
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.proof.verify import verify as verify_units
from secateur.repairs.methods import Method, Methods
from secateur.signals.loss import LossFn
from secateur.targets.blocks.apply import FORMS
from secateur.targets.blocks.apply import apply as apply_blocks
from secateur.targets.blocks.apply import verify as verify_blocks
from secateur.targets.blocks.remove import names_after, removed_paths
from secateur.targets.blocks.repair import repaired as repaired_blocks
from secateur.targets.blocks.trace import trace as trace_blocks
from secateur.targets.together.graph import Joined, joined, part
from secateur.targets.units.apply import Applier
from secateur.targets.units.module_form.unrealisable import restricted
from secateur.targets.units.record import Record, attach, record_of
from secateur.targets.units.tensors import removed_positions


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    forward: Forward | None = None,
) -> Joined:
    """Units and residual blocks of a model: see `secateur.trace`.

    Raises:
        NothingToPruneError: There are no units, or no blocks, that may go.
        CaptureError: The model cannot be captured, or a group of units is named as one of blocks.
    """
    more_inputs = list(more_inputs)
    units = trace_units(model, example_inputs, more_inputs=more_inputs, methods=methods, forward=forward)
    return joined(units, trace_blocks(model, example_inputs, more_inputs=more_inputs, forward=forward))


def apply(
    model: nn.Module,
    plan: Plan,
    form: str = "auto",
    *,
    graph: Joined | None = None,
    example_inputs: Any = None,
    on_unrealisable: Literal["graph", "leave"] = "graph",
) -> nn.Module:
    """A new model without the removed blocks and units, always of form ``module``: see `secateur.apply`.

    The blocks go first. The model without them is traced, and loses the units.

    Raises:
        PlanError: The plan is for another model, or removes what may not go.
        ApplyError: A module cannot express what the plan removes, and `on_unrealisable` is not ``leave``.
        SettingError: Another form.
    """
    if form not in FORMS:
        raise SettingError(
            f"apply(form={form!r}): expected one of {', '.join(FORMS)} for units and blocks together."
        )
    model = unwrap(model)
    plan.check(fingerprint(model))
    graph = graph or _traced(model, plan, example_inputs)
    plan.check_graph(graph)
    plan = plan.model_copy().of_graph()  # its parts have the costs of the whole
    base = apply_blocks(model, part(plan, "block"), graph=graph.others)
    dropped = record_of(base)
    rest = without_blocks(model, plan, dropped.stand_ins)
    if not any(group.removed for group in rest.groups):
        return attach(base, replace(dropped, plan=plan, sizes={}, numbers=dropped.sizes))
    given = graph.units.captured_inputs()
    if example_inputs is not None:
        given = plan.inputs.arguments(example_inputs, device_of(model))
    within = retrace(base, rest.inputs, given, folds=rest.folded, allow_inexact=False)
    small = Applier(base, within)(
        _on(within, rest),
        "auto" if on_unrealisable == "leave" else "module",
        example_inputs=example_inputs,
        on_unrealisable="leave",
    )
    done = record_of(small)
    left = _left_whole(rest, done.plan)
    if left:
        costed: Any = graph  # as if it were one of units
        plan = restricted(plan, costed, [group.name for group in plan.groups if group.name not in left])
    note = " ".join(filter(None, (dropped.note, done.note)))
    found = replace(done, plan=plan, note=note, numbers=dropped.sizes, stand_ins=dropped.stand_ins)
    return attach(small, found)


def without_blocks(model: nn.Module, plan: Plan, stand_ins: Iterable[str]) -> Plan:
    """What a plan still removes once its blocks are gone, by the names that tensors then have.

    Args:
        model: The dense model.
        plan: The plan for both.
        stand_ins: Paths of blocks in whose place a module passes the stream on.
    """
    units = part(plan, "unit")
    tensors = {piece.tensor for group in units.groups for piece in group.slices}
    names = names_after(model, (*tensors, *plan.folded), removed_paths(plan), stand_ins)
    groups = []
    for group in units.groups:
        left = [piece for piece in group.slices if piece.tensor in names]
        if left:
            slices = tuple(piece.model_copy(update={"tensor": names[piece.tensor]}) for piece in left)
            groups.append(group.model_copy(update={"slices": slices}))
    folds = tuple(names[name] for name in plan.folded if name in names)
    update = {"groups": tuple(groups), "folded": folds, "certificates": {}}
    return units.model_copy(update=update).of_graph()  # its costs are those of the whole


def _on(graph: Graph, rest: Plan) -> Plan:
    """The plan as one for the groups of the model without the blocks.

    Raises:
        ApplyError: These groups cannot lose the same.
    """
    gone = removed_positions(rest)
    keep = {}
    for group in graph.groups:
        mask = np.ones(group.size, dtype=bool)
        for piece in group.slices:
            mask[piece.unit[np.isin(piece.position, gone.get(piece.tensor, {}).get(piece.axis, ()))]] = False
        keep[group.name] = mask
    header = {"allocator": rest.allocator, "seed": rest.seed, "settings": rest.settings}
    found = Plan.build(graph, keep, budget=rest.budget, **header)  # type: ignore[arg-type]
    if odd := _places(found) ^ _places(rest):
        tensor, axis, _ = min(odd)
        raise ApplyError(
            f"apply: expected the model without the blocks to lose the same units, got another removal along "
            f"axis {axis} of {tensor!r}. Prune one granularity after the other."
        )
    return found


def _places(plan: Plan) -> set[tuple[str, int, int]]:
    """Every position that a plan removes."""
    return {
        (tensor, axis, int(place))
        for tensor, axes in removed_positions(plan).items()
        for axis, places in axes.items()
        for place in places
    }


def _left_whole(rest: Plan, done: Plan) -> set[str]:
    """The groups of a plan that were left as they were."""
    gone = _places(done)
    return {
        group.name
        for group in rest.groups
        for piece in group.slices
        if any((piece.tensor, piece.axis, place) not in gone for place in piece.removed)
    }


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    graph: Joined | None = None,
    more_inputs: Iterable[Any] = (),
    other_sizes: bool = True,
    tolerance: float = 1e-9,
) -> Proof:
    """Compare in float64 with the masked dense model in which the removed blocks are bypassed.

    First the model that lacks the blocks alone is compared with the dense one that bypasses them. Then the
    pruned model is compared with that one, masked, as `secateur.verify` does for units.

    Raises:
        VerificationError: One of these differs.
        PlanError: The plan is for another model.
    """
    model = unwrap(model)
    plan.check(fingerprint(model))
    others = graph.others if graph is not None else trace_blocks(model, _inputs(model, plan, example_inputs))
    blocks = part(plan, "block").of_graph()  # its costs are those of the whole
    base = apply_blocks(model, blocks, graph=others)
    options: dict[str, Any] = {"other_sizes": other_sizes, "tolerance": tolerance}
    first = verify_blocks(
        model, base, blocks, example_inputs, graph=others, more_inputs=more_inputs, **options
    )
    rest = without_blocks(model, plan, record_of(base).stand_ins)
    rest = rest.model_copy(update={"fingerprint": fingerprint(base)}).of_graph()
    proof = verify_units(base, small, rest, example_inputs, **options)
    difference = max(first.difference, proof.difference)
    return replace(proof, difference=difference, reference="blocks bypassed, then masked")


def repair(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: Methods = "auto",
    *,
    own: Mapping[str, Method] | None = None,
    graph: Joined | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Reduce the error that removed units and blocks cause, in one pass: see `secateur.repair`.

    The repairs see the dense model without the units, in which the blocks are bypassed: it computes what the
    pruned model does. The result goes into the pruned model.
    """
    model = unwrap(model)
    data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
    graph = graph or _traced(model, record_of(small).plan, data.to(device_of(model)).first().inputs)
    plan = whole_where_dropped(model, record_of(small).plan)
    start = Applier(model, graph.units)(part(plan, "unit").model_copy().of_graph(), "module")
    attach(start, Record(plan, "module"))
    options: dict[str, Any] = {"own": own, "loss_fn": loss_fn, "seed": seed, "progress": progress}
    return repaired_blocks(small, model, data, methods, [graph.units], graph.others, start, **options)


def whole_where_dropped(model: nn.Module, plan: Plan) -> Plan:
    """The plan without removals of units that go with their blocks: these mean nothing.

    Units of a layer that a block which stays shares are still there.
    """
    tensors = {piece.tensor for group in plan.groups for piece in group.slices}
    staying = names_after(model, tensors, removed_paths(plan))

    def kept(group: Any) -> Any:
        if any(piece.tensor in staying for piece in group.slices):
            return group
        slices = tuple(piece.model_copy(update={"removed": ()}) for piece in group.slices)
        return group.model_copy(update={"removed": (), "slices": slices})

    found = plan.model_copy(update={"groups": tuple(map(kept, plan.groups))})
    return found.of_graph() if plan.slices_known else found


def _traced(model: nn.Module, plan: Plan, example_inputs: Any) -> Joined:
    if not plan.inputs.head_sizes:
        return trace(model, _inputs(model, plan, example_inputs))
    from secateur.targets.headsizes.blocks import trace as trace_head_sizes  # which imports this module

    return trace_head_sizes(model, _inputs(model, plan, example_inputs))


def _inputs(model: nn.Module, plan: Plan, example_inputs: Any) -> Any:
    args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
    return kwargs or args
