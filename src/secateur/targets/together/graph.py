"""The units of a model, and the experts or blocks of it, as groups that a rule decides on together."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.allocators.naming import covers, layers_of
from secateur.calibration import Forward
from secateur.common.models import unwrap
from secateur.errors import CaptureError
from secateur.graph.costs import CostModel
from secateur.graph.graph import Graph
from secateur.graph.groups import Frozen, Group, Left, Role
from secateur.graph.inputs import InputSpec
from secateur.graph.trace import trace as trace_units
from secateur.measure.cost import Cost
from secateur.plan import Plan
from secateur.targets.blocks.graph import BlockGraph
from secateur.targets.experts.graph import ExpertGraph
from secateur.targets.experts.trace import trace as trace_experts

if TYPE_CHECKING:
    from secateur.allocators.base import Allocator
    from secateur.allocators.limits import Limits

OTHERS: tuple[Role, ...] = ("expert", "block")
"""Roles of slices in groups that are no groups of units."""

V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Joined:
    """Units, and what is removed from the module itself. Rules and `sc.apply` take it like a `Graph`.

    Attributes:
        units: The trace of the units, those inside experts or blocks too.
        others: The trace of the experts, an `ExpertGraph`, or of the blocks, a `BlockGraph`.
        groups: The groups of both.
        costs: Costs as functions of what is kept: first all units of `units`, then those of `others`.
    """

    units: Graph
    others: Any
    groups: tuple[Group, ...]
    costs: CostModel = field(repr=False)

    @property
    def granularity(self) -> Literal["unit+expert", "unit+block"]:
        """What may be removed."""
        return "unit+expert" if self.others.granularity == "expert" else "unit+block"

    @property
    def model(self) -> nn.Module:
        """The dense model itself, not a copy."""
        found: nn.Module = self.others.model
        return found

    @property
    def left(self) -> tuple[Left, ...]:
        """Groups of both that are left alone as a whole, and why."""
        return (*self.units.left, *self.others.left)

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """As for `Graph`."""
        return self.units.frozen

    @property
    def fingerprint(self) -> str:
        """As for `Graph`."""
        return self.units.fingerprint

    @property
    def inputs(self) -> InputSpec:
        """As for `Graph`."""
        return self.units.inputs

    @property
    def folded(self) -> tuple[str, ...]:
        """As for `Graph`."""
        return self.units.folded

    @property
    def costs_follow_data(self) -> bool:
        """As for `Graph`."""
        return self.units.costs_follow_data

    @property
    def static_batch(self) -> int | None:
        """As for `Graph`."""
        return self.units.static_batch

    @property
    def device(self) -> torch.device:
        """Where the model's first tensor lives."""
        return self.units.device

    def __getitem__(self, name: str) -> Group:
        """The group of this name."""
        found: Group = (self.others if self._is_other(name) else self.units)[name]
        return found

    def adapted(self, rule: Allocator, limits: Limits) -> tuple[Allocator, Limits]:
        """The rule as one for both, and the limits with what the experts or the blocks need.

        In `limits`, the name of a group of units does not mean the block that they are in.
        """
        from secateur.targets.together.rule import Together  # which imports this module

        both = Together.of(rule, self.others.granularity)
        exact = {name for group in self.units.groups for name in (group.name, glob.escape(group.name))}
        rest = tuple(part for part in limits.ignore if str(part) not in exact)
        inner, found = self.others.adapted(both.others, replace(limits, ignore=rest))
        known = dict.fromkeys(name for name in map(str, limits.ignore) if self._matches(name))
        return replace(both, others=inner), replace(found, ignore=(*(known | dict.fromkeys(found.ignore)),))

    def given(self, keep: Mapping[str, NDArray[np.bool_]]) -> Graph:
        """The units, with their costs for a given choice of experts or blocks.

        Args:
            keep: By group of `others`, True for what stays. [group.size] Groups not named stay whole.
        """
        masks = [keep.get(group.name, np.ones(group.size, dtype=bool)) for group in self.others.groups]
        return self.units.with_costs(self.costs.given(np.concatenate(masks)))

    def limits_of_others(self, limits: Limits) -> Limits:
        """The limits for experts or blocks. Limits on numbers of units do not apply to blocks."""
        return limits if self.others.granularity == "expert" else replace(limits, round_to=1, min_keep=1)

    def cost(self, keep: Mapping[str, NDArray[np.bool_]] | None = None) -> Cost:
        """The cost with `keep` [group.size] by group name; unnamed groups stay.

        Removing a neuron of a removed expert or block saves nothing more. MACs are those of the captured
        program; each token still uses as many experts, so a removed one only saves its part of the router.

        Raises:
            PlanError: A name is no group, or a mask has another size than its group.
        """
        keep = keep or {}
        params, macs = self.sweep({name: np.where(mask, 1, 0) for name, mask in keep.items()}, 1)
        of_others = self.others.cost({name: mask for name, mask in keep.items() if self._is_other(name)})
        found: Cost = replace(of_others, params=int(params[0]), macs=int(macs[0]))
        return found

    def sweep(
        self, gone: Mapping[str, NDArray[np.int64]], stages: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and MACs at every stage of a removal, as `Graph.sweep`. [stages] each"""
        slots = np.full(self.costs.slots, stages, dtype=np.int64)
        self.units.spread({n: when for n, when in gone.items() if not self._is_other(n)}, slots)
        start = self.units.costs.slots
        for group in self.others.groups:
            slots[start : start + group.size] = gone.get(group.name, stages)
            start += group.size
        return self.costs.sweep(slots, stages)

    def _is_other(self, name: str) -> bool:
        return any(group.name == name for group in self.others.groups)

    def _matches(self, pattern: str) -> bool:
        """Whether a pattern of `Limits` means a group."""
        return any(
            pattern == glob.escape(group.name)
            or any(covers(pattern, n) for n in (group.name, *layers_of(group)))
            for group in self.groups
        )

    def __str__(self) -> str:
        """Both tables."""
        return f"{self.units}\n\n{self.others}"


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    forward: Forward | None = None,
) -> Joined:
    """Units and experts of a model: see `secateur.trace`.

    Raises:
        NothingToPruneError: There are no units, or no experts, that may go.
        CaptureError: The model cannot be captured, or a group of units is named as a block of experts.
    """
    experts = trace_experts(unwrap(model), example_inputs, forward=forward)
    units = trace_units(model, example_inputs, more_inputs=more_inputs, methods=methods, forward=forward)
    return joined(units, experts)


def joined(units: Graph, others: ExpertGraph | BlockGraph) -> Joined:
    """Join the trace of a model's units with that of its experts or its blocks.

    Raises:
        CaptureError: Two groups have one name.
    """
    role = others.granularity
    groups = tuple(
        replace(group, slices=tuple(replace(piece, role=role) for piece in group.slices))
        for group in others.groups
    )
    if twice := {group.name for group in units.groups} & {group.name for group in groups}:
        raise CaptureError(
            f"trace: expected groups of units and of {role}s with names of their own, got {min(twice)!r} "
            "twice. Prune one granularity after the other."
        )
    starts, start = dict[str, int](), units.costs.slots
    for group in groups:
        starts[group.name] = start
        start += group.size
    costs = units.costs.with_terms({}, start - units.costs.slots)
    return Joined(
        units, others, (*units.groups, *groups), costs.with_terms(others.priced(units, costs, starts))
    )


def part(plan: Plan, granularity: Literal["unit", "expert", "block"]) -> Plan:
    """Return the part of a plan on units, experts or blocks. Its costs stay those of the whole plan."""

    def kind(group: Any) -> str:
        return next((piece.role for piece in group.slices if piece.role in OTHERS), "unit")

    groups = tuple(group for group in plan.groups if kind(group) == granularity)
    return plan.model_copy(update={"groups": groups, "granularity": granularity})
