"""Ranks in `sc.apply` and `sc.verify`: two layers of few directions, compared with their product."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from secateur.common.formatting import shorten
from secateur.common.models import device_of, unwrap
from secateur.errors import SettingError
from secateur.plan import Plan
from secateur.proof.diagnosis import Pair
from secateur.proof.proving import Comparisons
from secateur.proof.verify import Proof, argument_sets
from secateur.proof.verify import verify as verify_units
from secateur.targets.lowrank.graph import RankGraph, dense_fingerprint
from secateur.targets.lowrank.opened import Opened, as_asked, opened, require_pairs
from secateur.targets.lowrank.pair import LowRank, dense_of, replace_modules, tensors_of
from secateur.targets.units.apply import FORMS, Applier
from secateur.targets.units.compare import double_copy
from secateur.targets.units.copying import duplicate
from secateur.targets.units.masked import masked
from secateur.targets.units.module_form.module import smaller_module
from secateur.targets.units.record import Record, attach, record_of, with_note

_NAMED = 12
"""The most layers that the note names."""


def apply(
    model: nn.Module,
    plan: Plan,
    form: Literal["auto", "module", "graph", "masked"] = "auto",
    *,
    graph: RankGraph | None = None,
    example_inputs: Any = None,
    on_unrealisable: Literal["graph", "leave"] = "graph",
) -> nn.Module:
    """A new model in which each layer that loses directions is two layers: see `secateur.apply`.

    Layers that lose none are those of the dense model, bit for bit.

    Args:
        model: What `secateur.factorise` returned.
        plan: The decision.
        form: As for `secateur.apply`.
        graph: Not read; the model says what it needs.
        example_inputs: As for `secateur.apply`.
        on_unrealisable: As for `secateur.apply`; it concerns channels, neurons and heads.

    Raises:
        PlanError: The plan is for another model, or the model is not factorised.
        SettingError: Another form.
    """
    if form not in FORMS:
        raise SettingError(f"apply(form={form!r}): expected one of {', '.join(FORMS)}.")
    model = unwrap(model)
    plan.check(dense_fingerprint(model))
    require_pairs("apply", model)
    return applied(opened(model, plan), plan, form, example_inputs, on_unrealisable)


def applied(
    found: Opened,
    plan: Plan,
    form: Literal["auto", "module", "graph", "masked"] = "auto",
    example_inputs: Any = None,
    on_unrealisable: Literal["graph", "leave"] = "graph",
) -> nn.Module:
    """Remove what a plan says from an opened model; see `apply`."""
    own = found.plan.model_copy().of_graph()  # its names are those of another graph than its own
    removed = [group.name for group in own.groups if group.removed]
    directions = {f"{path}.first" for path in found.pairs}
    if form in ("auto", "module") and set(removed) <= directions:  # no size of the code changes
        small = attach(smaller_module(found.model, own), Record(own, "module"))
    else:
        small = Applier(found.model)(
            own, form, example_inputs=example_inputs, on_unrealisable=on_unrealisable
        )
    attach(small, replace(record_of(small), plan=as_asked(found, record_of(small).plan, plan)))
    paths = found.pairs
    return (
        with_note(small, f"Layers that became two of low rank: {shorten(paths, _NAMED)}.") if paths else small
    )


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    other_sizes: bool = True,
    tolerance: float = 1e-9,
) -> Proof:
    """Compare in float64 with the model whose single layers have the products of each pair's weights.

    First as `secateur.verify` does for units: with the factorised model, with zeros where layers read removed
    directions. Then, at the same sizes, with the dense model's own layers: each layer that became two gets
    the product of their weights.

    Raises:
        VerificationError: One of these differs.
        PlanError: The plan is for another model.
    """
    model = unwrap(model)
    plan.check(dense_fingerprint(model))
    require_pairs("verify", model)
    found = opened(model, plan)
    known = found.plan.model_copy().of_graph()
    options: dict[str, Any] = {"other_sizes": other_sizes, "tolerance": tolerance}
    proof: Proof = inspect.unwrap(verify_units)(found.model, small, known, example_inputs, **options)
    if proof.reference != "masked":
        return proof
    pair = Pair(found.model, small, partial(_with_products, model, found))
    comparisons = Comparisons(known, tolerance, proof.reference)
    for some in argument_sets(plan.inputs, example_inputs, device_of(found.model), other_sizes=other_sizes):
        for arguments in some:
            if comparisons.compare(pair, arguments) is not None:
                break  # what the dense model refuses says nothing: the next one may
    return replace(proof, difference=max(proof.difference, comparisons.worst), reference="products")


def _with_products(model: nn.Module, found: Opened) -> nn.Module:
    """The dense model in float64 with the products as weights, and zeros for removed units.

    Args:
        model: The factorised model.
        found: The model for one plan; see `opened`.
    """
    reference = double_copy(masked(found.model, found.plan))
    layers: dict[str, nn.Module] = {}
    for path in found.pairs:
        dense, pair = model.get_submodule(path), reference.get_submodule(path)
        if not isinstance(dense, LowRank) or not isinstance(pair, LowRank):
            continue
        layer = dense_of(dense)
        if layer is None:
            continue
        layer = layers[path] = duplicate(layer).to(device=device_of(pair), dtype=torch.float64)
        weight, bias = tensors_of(layer)
        with torch.no_grad():
            weight.copy_(pair.weight)
            if bias is not None and pair.bias is not None:
                bias.copy_(pair.bias)
    replace_modules(reference, layers)
    return reference
