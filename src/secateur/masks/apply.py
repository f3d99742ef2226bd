"""Setting masked weights to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.apply.copying import duplicate
from secateur.apply.record import Record, attach
from secateur.errors import PlanError, SettingError, VerificationError
from secateur.graph.graph import Graph
from secateur.graph.graph import fingerprint as fingerprint_of
from secateur.masks.offload import store, stored, values_of
from secateur.masks.plan import MaskPlan
from secateur.models import unwrap
from secateur.plan import Plan
from secateur.verify import Proof

FORMS = ("auto", "masked")
"""The forms that a masked model can have."""


def apply(model: nn.Module, plan: MaskPlan, graph: Graph | None = None, *, form: str = "auto") -> nn.Module:
    """A copy of a model with its masked weights at zero.

    Args:
        model: The dense model, which is left as it was.
        plan: The masks.
        graph: Its trace, if there is one: then the result can be given to `sc.repair`, which keeps what is
            zero at zero, and to `sc.save`.
        form: ``auto`` or ``masked``, which are the same.

    Raises:
        PlanError: The plan is of another model.
        ApplyError: The model cannot be copied.
        SettingError: Another form.
    """
    if form not in FORMS:
        raise SettingError(f"apply(form={form!r}): expected one of {', '.join(FORMS)} for single weights.")
    model = unwrap(model)
    small = duplicate(model)
    with torch.no_grad():
        for layer, name, keep in masked_layers(small, plan):
            store(layer, stored(layer, name).masked_fill(~keep, 0), name)
    if graph is not None:
        note = f"by {plan.allocator}, {plan.sentence()}"
        whole = Plan.build(graph, {}, allocator="none", seed=plan.seed)
        attach(small, Record(whole, "masked", note))
    return small


def check(model: nn.Module, small: nn.Module, plan: MaskPlan) -> None:
    """Makes sure that a masked model is the dense one with exactly the masked weights at zero.

    Raises:
        PlanError: The plan is of another model.
        VerificationError: Any tensor differs in any bit.
    """
    expected, found = values_of(apply(model, plan)), values_of(unwrap(small))
    wrong = [n for n in expected.keys() | found.keys() if not _same(expected.get(n), found.get(n))]
    if wrong:
        raise VerificationError(
            f"masks: expected the dense model with its masked weights at zero, got a difference in "
            f"{min(wrong)!r} ({len(wrong)} tensors in all). Check a model before it is repaired or trained."
        )


def verify(model: nn.Module, small: nn.Module, plan: MaskPlan) -> Proof:
    """`check`, as `sc.verify` says it."""
    check(model, small, plan)
    return Proof(0.0, 0.0, "masks", len(model.state_dict()))


def masked_layers(model: nn.Module, plan: MaskPlan) -> list[tuple[nn.Module, str, Tensor]]:
    """For each masked tensor the module that has it, its name there, and its mask, on its device.

    Raises:
        PlanError: The plan is of another model.
    """
    found = fingerprint_of(model)
    if found != plan.fingerprint:
        raise PlanError(
            f"masks: expected the model they were made for (fingerprint {plan.fingerprint[:12]}), got one "
            f"with other parameter names or shapes ({found[:12]}). Use that model, or make new ones."
        )
    owners = (
        (model.get_submodule(p), n, m)
        for (p, _, n), m in ((n.rpartition("."), m) for n, m in plan.masks.items())
    )
    return [
        (layer, name, torch.tensor(mask, device=stored(layer, name).device)) for layer, name, mask in owners
    ]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b)
