"""A factorised model for one plan: pairs only for layers that lose directions, single layers elsewhere."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from secateur.errors import PlanError
from secateur.graph.graph import fingerprint
from secateur.group_decision import GroupDecision, SliceDecision
from secateur.plan import Plan
from secateur.targets.lowrank.layers import is_linear
from secateur.targets.lowrank.pair import (
    FIRST,
    SECOND,
    LowRank,
    copy_without_layers,
    dense_of,
    empty_pair,
    is_transposed,
    pairs_of,
    replace_modules,
    tensors_of,
)
from secateur.targets.units.copying import duplicate
from secateur.targets.units.tensors import submodule_called

GRANULARITIES = ("rank", "unit+rank")


@dataclass(frozen=True, eq=False)
class Opened:
    """A model in which only the layers that lose directions are pairs, and the plan as one of its units.

    Attributes:
        model: The model.
        plan: What is removed, by the names of this model.
        pairs: Paths of the pairs.
        names: Name of a group in the user's plan -> its name in `plan`.
    """

    model: nn.Module
    plan: Plan
    pairs: tuple[str, ...]
    names: Mapping[str, str]


def opened(model: nn.Module, plan: Plan) -> Opened:
    """Make the model for a plan.

    Args:
        model: A factorised model. Or the dense one: then the new pairs have no values yet.
        plan: A plan with granularity ``rank`` or ``unit+rank``.

    Raises:
        PlanError: The plan keeps the last unit of a layer, with which two layers save nothing, and removes
            others.
    """
    ranks = _ranks(model, plan)
    cut = [path for path, group in ranks.items() if group.removed]
    for path in cut:
        if ranks[path].size - 1 not in ranks[path].removed:
            raise PlanError(
                f"plan: expected the last unit of {path}.{FIRST} to be removed before others, got a plan "
                "that keeps it: two layers with so many directions save nothing. Remove it too, or none."
            )
    given = pairs_of(model)
    layers = {path: _dense_layer(path, pair) for path, pair in given.items()}
    stay = {path: _like(given[path], layer) for path, layer in layers.items() if path not in cut}
    found = copy_without_layers(model, stay)
    if not given:
        replace_modules(found, {path: empty_pair(found.get_submodule(path)) for path in cut})
    whole = {path: model.get_submodule(path) for path in (given or ranks) if path not in cut}
    gone = {f"{path}.{FIRST}" for path in whole}
    rest = [group for group in plan.groups if group.name not in gone]
    groups = tuple(_renamed(group, whole) for group in rest)
    names = {group.name: renamed.name for group, renamed in zip(rest, groups, strict=True)}
    update = {"groups": groups, "fingerprint": fingerprint(found), "granularity": "unit"}
    return Opened(found, plan.model_copy(update=update), tuple(cut), names)


def closed(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """Copy a factorised model, with single layers in place of the pairs at these paths."""
    given = pairs_of(model)
    return duplicate(
        model, {id(given[path]): _like(given[path], _dense_layer(path, given[path])) for path in paths}
    )


def as_asked(found: Opened, done: Plan, plan: Plan) -> Plan:
    """Return the user's plan without the groups that were left whole.

    Args:
        found: The opened model.
        done: The plan in the record of what was applied to it, which may leave groups whole.
        plan: The user's plan.
    """
    untouched = {group.name for group in done.groups if not group.removed}
    left = {name for name, renamed in found.names.items() if renamed in untouched}
    groups = tuple(
        group.model_copy(
            update={
                "removed": (),
                "slices": tuple(s.model_copy(update={"removed": ()}) for s in group.slices),
            }
        )
        if group.removed and group.name in left
        else group
        for group in plan.groups
    )
    update = {"groups": groups, "predicted": done.predicted}
    return plan if groups == plan.groups else plan.model_copy(update=update)


def require_pairs(where: str, model: nn.Module) -> None:
    """Refuse a model without pairs of layers.

    Raises:
        PlanError: The model has none.
    """
    if not pairs_of(model):
        raise PlanError(
            f"{where}: expected the model whose directions the plan is about, got a "
            f"{type(model).__name__} whose layers are whole. Pass what sc.factorise returned."
        )


def _ranks(model: nn.Module, plan: Plan) -> dict[str, GroupDecision]:
    """The groups of directions, by the path of their layer."""
    found: dict[str, GroupDecision] = {}
    for group in plan.groups:
        path = group.name.removesuffix(f".{FIRST}")
        module = submodule_called(model, path) if path != group.name else None
        if module is not None and (isinstance(module, LowRank) or is_linear(module)):
            found[path] = group
    return found


def _dense_layer(path: str, pair: LowRank) -> nn.Module:
    """The single layer that a pair was made of; PlanError if it has none."""
    layer = dense_of(pair)
    if layer is None:
        raise PlanError(
            f"plan: expected a model that sc.factorise returned, got one whose {path} is of low rank "
            "already. Plan for the dense model."
        )
    return layer


def _like(pair: LowRank, layer: nn.Module) -> nn.Module:
    """Copy the single layer that a pair was made of, with the device and dtype of the pair."""
    weight, _ = tensors_of(pair[0])
    return duplicate(layer).to(device=weight.device, dtype=weight.dtype).train(pair.training)


def _renamed(group: GroupDecision, whole: dict[str, nn.Module]) -> GroupDecision:
    """Rename the tensors of a group for a model in which some pairs are single layers."""

    def renamed(piece: SliceDecision) -> SliceDecision:
        inner, _, leaf = piece.tensor.rpartition(".")
        path, _, part = inner.rpartition(".")
        if path not in whole or part not in (FIRST, SECOND):
            return piece
        swapped = has_transposed_weight(whole[path]) and leaf == "weight"
        return piece.model_copy(
            update={"tensor": f"{path}.{leaf}", "axis": 1 - piece.axis if swapped else piece.axis}
        )

    path = re.sub(rf"\.{SECOND}(?=$|#)", "", group.name)
    name = path if path.partition("#")[0] in whole else group.name
    return group.model_copy(update={"name": name, "slices": tuple(map(renamed, group.slices))})


def has_transposed_weight(module: nn.Module) -> bool:
    """Whether the weight of a layer, or of the layer that a pair was made of, is [in, out]."""
    return module.transposed if isinstance(module, LowRank) else is_transposed(module)
