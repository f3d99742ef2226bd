"""Set masked weights to zero, and check that nothing else changed."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from secateur.common.caches import without_caches
from secateur.common.models import unwrap
from secateur.common.offload import store, stored, values_of
from secateur.errors import PlanError, SettingError, VerificationError
from secateur.graph.graph import Graph
from secateur.graph.graph import fingerprint as fingerprint_of
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.targets.units.copying import duplicate
from secateur.targets.units.record import Record, attach
from secateur.targets.weights.plan import MaskPlan

FORMS = ("auto", "masked")
"""The forms that a masked model can have."""


def apply(model: nn.Module, plan: MaskPlan, graph: Graph | None = None, *, form: str = "auto") -> nn.Module:
    """Copy a model and set its masked weights to zero.

    Args:
        model: The dense model. It is not changed.
        plan: The masks.
        graph: The model's trace. With it, the result can be passed to `sc.repair`, which keeps zeros at zero,
            and to `sc.save`, and lacks what forward made of dense weights and keeps.
        form: ``auto`` or ``masked``. Both do the same.

    Returns:
        The masked copy. All shapes stay the same.

    Raises:
        PlanError: The plan is of another model.
        ApplyError: The model cannot be copied.
        SettingError: `form` is neither.
    """
    if form not in FORMS:
        raise SettingError(f"apply(form={form!r}): expected one of {', '.join(FORMS)} for single weights.")
    model = unwrap(model)
    with without_caches(model, graph.captured_inputs) if graph is not None else nullcontext():
        small = duplicate(model)  # what it made of weights and kept would stay dense
    with torch.no_grad():
        for layer, name, keep in masked_layers(small, plan):
            store(layer, stored(layer, name).masked_fill(~keep, 0), name)
    if graph is not None:
        note = f"by {plan.allocator}, {plan.sentence()}"
        whole = Plan.build(graph, {}, allocator="none", seed=plan.seed)
        attach(small, Record(whole, "masked", note))
    return small


def check(model: nn.Module, small: nn.Module, plan: MaskPlan) -> None:
    """Check that a masked model equals the dense model with exactly the masked weights at zero.

    Args:
        model: The dense model.
        small: The masked model.
        plan: The masks.

    Raises:
        PlanError: The plan was made for another model.
        VerificationError: A parameter or buffer differs from the expected one in at least one bit.
    """
    expected, found = values_of(apply(model, plan)), values_of(unwrap(small))
    wrong = [n for n in expected.keys() | found.keys() if not _same(expected.get(n), found.get(n))]
    if wrong:
        raise VerificationError(
            f"masks: expected the dense model with its masked weights at zero, got a difference in "
            f"{min(wrong)!r} ({len(wrong)} tensors in all). Check a model before it is repaired or trained."
        )


def verify(model: nn.Module, small: nn.Module, plan: MaskPlan) -> Proof:
    """Run `check`, and return the result as a `Proof`. `sc.verify` calls this."""
    check(model, small, plan)
    return Proof(0.0, 0.0, "masks", len(model.state_dict()))


def masked_layers(model: nn.Module, plan: MaskPlan) -> list[tuple[nn.Module, str, Tensor]]:
    """Find the module and the mask of each masked tensor.

    Returns:
        One (module, name of the tensor in the module, mask) for each mask, in the plan's order. The mask has
        the tensor's shape and device; True stays.

    Raises:
        PlanError: The plan was made for another model.
    """
    found = fingerprint_of(model)
    if found != plan.fingerprint:
        raise PlanError(
            f"masks: expected the model they were made for (fingerprint {plan.fingerprint[:12]}), got one "
            f"with other parameter names or shapes ({found[:12]}). Use that model, or make new ones."
        )
    layers = []
    for path, mask in plan.masks.items():
        weight = dict(model.named_parameters(remove_duplicate=False)).get(path)
        if weight is None or tuple(weight.shape) != mask.shape:
            got = "none" if weight is None else f"{path} {tuple(weight.shape)}"
            raise PlanError(
                f"masks: expected a weight of the mask's shape {mask.shape} for {path!r}, got {got}. "
                "Make the masks again."
            )
        module, _, name = path.rpartition(".")
        layer = model.get_submodule(module)
        layers.append((layer, name, torch.tensor(mask, device=stored(layer, name).device)))
    return layers


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b)
