"""Blocks in `sc.apply` and `sc.verify`: dropped for real, compared with bypassed ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from secateur.common.formatting import shorten
from secateur.common.models import device_of, named_tensors, unwrap
from secateur.errors import PlanError, SettingError, VerificationError
from secateur.graph.graph import fingerprint
from secateur.measure.kernels import with_loop
from secateur.plan import Plan
from secateur.proof.verify import Proof, argument_sets
from secateur.targets.blocks.block import Block
from secateur.targets.blocks.graph import BlockGraph
from secateur.targets.blocks.remove import names_after, removed_paths, require_blocks
from secateur.targets.blocks.trace import trace
from secateur.targets.blocks.trial import carried_out, difference_of
from secateur.targets.units.compare import double_copy, require_same
from secateur.targets.units.record import Record, attach, record_of

FORMS = ("auto", "module")
"""The forms that a model without some of its blocks can have."""

_NAMED = 12
"""The most blocks that the note names."""


def removed_blocks(graph: BlockGraph, plan: Plan) -> list[Block]:
    """The blocks that a plan removes.

    Raises:
        PlanError: One may not go in this graph.
    """
    known = {block.path: block for block in graph.all_blocks()}
    for path in removed_paths(plan):
        if path not in known:
            raise PlanError(
                f"plan: expected blocks that may go ({', '.join([*known][:4])}, …), got {path!r}. Let a rule "
                "decide on sc.trace(..., granularity='block')."
            )
    return [known[path] for path in removed_paths(plan)]


def apply(
    model: nn.Module,
    plan: Plan,
    form: str = "auto",
    *,
    graph: BlockGraph | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """A new model without the removed blocks, always of form ``module``: see `secateur.apply`.

    Raises:
        PlanError: The plan is for another model, or removes what may not go.
        SettingError: Another form.
    """
    if form not in FORMS:
        raise SettingError(f"apply(form={form!r}): expected one of {', '.join(FORMS)} for blocks.")
    model = unwrap(model)
    plan.check(fingerprint(model))
    require_blocks(model, removed_paths(plan))
    graph = graph or _traced(model, plan, example_inputs)
    plan.check_graph(graph)
    blocks = removed_blocks(graph, plan)
    small, passing, sizes = carried_out(model, blocks, graph.removals)
    stand_ins = {b.path: [b.stream, *b.returns] for b in blocks if b.path in passing}
    note = _note([block.path for block in blocks], [*stand_ins])
    return attach(small, Record(plan, "module", note, sizes=sizes, stand_ins=stand_ins))


def _note(dropped: Sequence[str], stand_ins: Sequence[str]) -> str:
    found = f"dropped: {shorten(dropped, _NAMED)}." if dropped else ""
    if stand_ins:
        found += (
            f" In place of {shorten(stand_ins, _NAMED)} stands a module that passes the stream on, since the "
            "code around counts its neighbours."
        )
    return found


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    graph: BlockGraph | None = None,
    more_inputs: Iterable[Any] = (),
    other_sizes: bool = True,
    tolerance: float = 1e-9,
) -> Proof:
    """Compare in float64 with the dense model in which the removed blocks are bypassed.

    All tensors are compared too, bit for bit, with the dense model's.

    Raises:
        VerificationError: The outputs differ by more than `tolerance`, relative to the largest, or a tensor
            differs.
        PlanError: The plan is for another model.
        SettingError: The dense model runs on none of the inputs.
    """
    model = unwrap(model)
    plan.check(fingerprint(model))
    graph = graph or _traced(model, plan, example_inputs)
    blocks = removed_blocks(graph, plan)
    sets = argument_sets(
        plan.inputs, example_inputs, device_of(model), more_inputs=more_inputs, other_sizes=other_sizes
    )
    dense, pruned = with_loop(double_copy(model)), with_loop(double_copy(small))
    difference, fault, sizes, outputs = difference_of(dense, pruned, blocks, sets, tolerance)
    if not sizes:
        raise SettingError(
            f"verify: expected inputs that {type(model).__name__} takes, got none. Pass example_inputs= on "
            "which the dense model runs and gives finite numbers."
        )
    if fault:
        raise VerificationError(
            f"verify: expected the pruned {type(model).__name__} to equal the dense one with the removed "
            f"blocks bypassed to {tolerance:.1g} relative in float64, but {fault}. Repair and training "
            "change what it computes: verify what apply returned."
        )
    require_same_tensors(model, small, blocks)
    return Proof(difference, tolerance, "blocks bypassed", outputs, sizes)


def require_same_tensors(model: nn.Module, small: nn.Module, blocks: Sequence[Block]) -> None:
    """Raise VerificationError unless the pruned model has the tensors of the dense one that stay."""
    tensors = named_tensors(model)
    names = names_after(model, tensors, [block.path for block in blocks], record_of(small).stand_ins)
    expected = {new: tensors[old] for old, new in names.items()}
    what = f"dense {type(model).__name__} without the removed blocks"
    require_same(expected, named_tensors(unwrap(small)), what)


def _traced(model: nn.Module, plan: Plan, example_inputs: Any) -> BlockGraph:
    args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
    return trace(model, kwargs or args)
