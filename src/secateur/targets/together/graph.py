"""The units and the experts of one model as groups that a rule decides on together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.calibration import Forward
from secateur.common.models import unwrap
from secateur.errors import CaptureError
from secateur.graph.costs import CostModel
from secateur.graph.folding import folded
from secateur.graph.graph import Graph
from secateur.graph.groups import Frozen, Group, Left
from secateur.graph.inputs import InputSpec
from secateur.graph.trace import trace as trace_units
from secateur.plan import Plan
from secateur.targets.experts.graph import ExpertCost, ExpertGraph
from secateur.targets.experts.trace import trace as trace_experts

if TYPE_CHECKING:
    from secateur.allocators.base import Allocator
    from secateur.allocators.limits import Limits

GRANULARITY = "unit+expert"

V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class UnitsAndExperts:
    """What `trace` finds for ``["unit", "expert"]``: rules and `sc.apply` take it like a `Graph`.

    Attributes:
        units: The trace of the units, those inside experts too.
        experts: The trace of the experts.
        groups: The groups of both.
    """

    granularity: ClassVar[Literal["unit+expert"]] = "unit+expert"

    units: Graph
    experts: ExpertGraph
    groups: tuple[Group, ...]
    costs: CostModel = field(repr=False)

    @property
    def model(self) -> nn.Module:
        """The dense model itself, not a copy."""
        return self.experts.model

    @property
    def left(self) -> tuple[Left, ...]:
        """Groups of units and sets of experts that are left alone as a whole, and why."""
        return (*self.units.left, *self.experts.left)

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
    def static_batch(self) -> int | None:
        """As for `Graph`."""
        return self.units.static_batch

    @property
    def device(self) -> torch.device:
        """Where the model's first tensor lives."""
        return self.experts.device

    def __getitem__(self, name: str) -> Group:
        """The group of this name."""
        return (self.experts if self._is_block(name) else self.units)[name]

    def adapted(self, rule: Allocator, limits: Limits) -> tuple[Allocator, Limits]:
        """The rule as one for both, and the limits so that every router can work with what they leave."""
        from secateur.targets.together.rule import Together  # which stands on this graph

        both = Together.of(rule)
        inner, limits = self.experts.adapted(both.experts, limits)
        return replace(both, experts=inner), limits

    def cost(self, keep: Mapping[str, NDArray[np.bool_]] | None = None) -> ExpertCost:
        """The cost with `keep` [group.size] by group name; unnamed groups stay.

        Parameters are counted exactly: a neuron in an expert that goes saves nothing more. MACs are those of
        the units, less what routers spend on experts that go: each token still uses as many experts.

        Raises:
            PlanError: A name is no group, or a mask has another size than its group.
        """
        keep = keep or {}
        params, macs = self.sweep({name: np.where(mask, 1, 0) for name, mask in keep.items()}, 1)
        kept = self.experts.cost(self._of_experts(keep)).experts
        return ExpertCost(int(params[0]), int(macs[0]), kept)

    def sweep(
        self, gone: Mapping[str, NDArray[np.int64]], stages: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and MACs at every stage of a removal, as `Graph.sweep`. [stages] each"""
        of_units = {name: when for name, when in gone.items() if not self._is_block(name)}
        _, macs = self.units.sweep(of_units, stages)
        slots = np.full(self.costs.slots, stages, dtype=np.int64)
        start = 0
        for group in self.groups:
            slots[start : start + group.size] = gone.get(group.name, stages)
            start += group.size
        params, routed = self.costs.sweep(slots, stages)
        return params, macs + routed

    def _is_block(self, name: str) -> bool:
        return any(block.name == name for block in self.experts.blocks)

    def _of_experts(self, values: Mapping[str, V]) -> dict[str, V]:
        return {name: value for name, value in values.items() if self._is_block(name)}

    def __str__(self) -> str:
        """Both tables."""
        return f"{self.units}\n\n{self.experts}"


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    forward: Forward | None = None,
) -> UnitsAndExperts:
    """Units and experts of a model: see `secateur.trace`.

    Raises:
        NothingToPruneError: There are no units, or no experts, that may go.
        CaptureError: The model cannot be captured, or a group of units is named as a block of experts.
    """
    model = unwrap(model)
    experts = trace_experts(model, example_inputs, forward=forward)
    units = trace_units(model, example_inputs, more_inputs=more_inputs, methods=methods, forward=forward)
    blocks = tuple(
        replace(group, slices=tuple(replace(piece, role="expert") for piece in group.slices))
        for group in experts.groups
    )
    if twice := {group.name for group in units.groups} & {group.name for group in blocks}:
        raise CaptureError(
            f"trace: expected groups of units and blocks of experts with names of their own, got "
            f"{min(twice)!r} twice. Prune one granularity after the other."
        )
    groups = (*units.groups, *blocks)
    return UnitsAndExperts(
        units, experts, groups, _costs(folded(experts.model, units.folded), groups, experts)
    )


def _costs(model: nn.Module, groups: tuple[Group, ...], experts: ExpertGraph) -> CostModel:
    """Costs as functions of what is kept, of units and of experts.

    Returns:
        The number of parameters; and the MACs that routers spend on the experts that stay, less those that
        they would spend on all experts. The latter are in the MACs of the units.
    """
    costs = CostModel(sum(group.size for group in groups), 1)
    pieces: dict[str, list[tuple[int, Any]]] = {}
    start = 0
    for group in groups:
        for piece in group.slices:
            pieces.setdefault(piece.tensor, []).append((start, piece))
        start += group.size
    routed = {name: experts.tokens for block in experts.blocks for name in experts.router_matrices(block)}
    for name, parameter in model.named_parameters():
        units = [np.full(size, -1, dtype=np.int64) for size in parameter.shape]
        along = [axis.copy() for axis in units]
        axes = []
        for first, piece in pieces.get(name, []):
            if piece.role == "expert" and len(np.unique(piece.unit)) == 1:
                axes.append(costs.axis(first + piece.unit[:1]))  # the whole tensor belongs to one expert
                continue
            along[piece.axis][piece.position] = first + piece.unit
            if piece.role != "expert":
                units[piece.axis][piece.position] = first + piece.unit
        costs.add("params", 1, [*axes, *map(costs.axis, along)])
        if name in routed:
            costs.add("macs", routed[name], map(costs.axis, along))
            costs.add("macs", -routed[name], map(costs.axis, units))
    return costs


def part(plan: Plan, granularity: Literal["unit", "expert"]) -> Plan:
    """What a plan for units and experts says of one of them. Its costs stay those of the whole plan."""
    wanted = granularity == "expert"
    groups = tuple(
        group for group in plan.groups if wanted == any(piece.role == "expert" for piece in group.slices)
    )
    return plan.model_copy(update={"groups": groups, "granularity": granularity})
