"""A traced model: which units may be removed, what is frozen and why, and what any choice would cost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.export import ExportedProgram

from secateur.common.models import named_tensors
from secateur.errors import PlanError
from secateur.graph.assemble import Assembled
from secateur.graph.costs import CostModel
from secateur.graph.coverage import Coverage, coverage_of
from secateur.graph.datasizes import nodes_of_data
from secateur.graph.flags import Reader
from secateur.graph.groups import Frozen, Group, Left, group_called
from secateur.graph.inputs import Arguments, InputSpec
from secateur.graph.kept import Kept, Labelled, Removed
from secateur.graph.nodes import tensor_of
from secateur.graph.programs import Programs
from secateur.graph.views import View
from secateur.measure.cost import Cost

if TYPE_CHECKING:
    from secateur.allocators.base import Allocator
    from secateur.allocators.limits import Limits


def fingerprint(model: nn.Module) -> str:
    """Hash the names and shapes of the state dict. Plans fit all models with the same hash. [hex]"""
    return fingerprint_of({name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()})


def fingerprint_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Hash names and shapes as `fingerprint` does."""
    lines = [f"{name} {shape}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced model: which units may be removed, and what each choice would cost. It never changes.

    Attributes:
        groups: The groups that may be pruned, in order of execution.
        left: Groups of which no unit may be removed, and why.
        frozen: Parts of tensors that may not shrink, and why.
        program: The captured forward pass. Its tensors are the model's own, unless weights were folded.
        programs: This program, and further ones for inputs of other sizes. They are captured when needed.
        fingerprint: Hash of the model's state-dict names and shapes.
        inputs: Shapes and dtypes of the example inputs.
        views: Other captured ways to run the model: at other sizes, in training mode, by other methods.
        folded: Names of computed weights that are treated as parameters: see `secateur.graph.folding`.
        values: Names of integer inputs for whose values alone the program is right, since sizes in the code
            depend on them. Inputs of other values get programs of their own.
        attributes: The plain attributes of the model's modules when it was traced.
        static_batch: The only batch size that the program takes; None if it takes any.
    """

    granularity: ClassVar[Literal["unit"]] = "unit"

    groups: tuple[Group, ...]
    left: tuple[Left, ...]
    frozen: tuple[Frozen, ...]
    program: ExportedProgram = field(repr=False)
    fingerprint: str
    inputs: InputSpec
    static_batch: int | None
    views: tuple[View, ...] = field(repr=False)
    _labelled: Mapping[View | None, Labelled] = field(repr=False)  # None: the forward pass
    _assembled: Assembled = field(repr=False)
    _costs: CostModel = field(repr=False)
    programs: Programs = field(repr=False)
    folded: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    attributes: Mapping[Reader, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Group:
        """The prunable group of this name."""
        return group_called(self.groups, name)

    @property
    def device(self) -> torch.device:
        """Where the model's first tensor lives (the CPU if it has none)."""
        return next((t.device for t in self.program.state_dict.values()), torch.device("cpu"))

    def adapted(self, rule: Allocator, limits: Limits) -> tuple[Allocator, Limits]:
        """Return the rule and the limits as they are; graphs of experts adapt them here."""
        return rule, limits

    def captured_inputs(self) -> Arguments:
        """The arguments that the program was captured with. A batch of one sample is doubled."""
        args, kwargs = self.program.example_inputs or self.inputs.example(device=self.device)
        return tuple(args), dict(kwargs)

    @property
    def all_groups(self) -> tuple[Group, ...]:
        """All groups that may be pruned, also those that `restricted_to` took out of `groups`."""
        left = {entry.group.name for entry in self.left}
        return tuple(group for group in self._assembled.groups if group.name not in left)

    @property
    def head_sizes(self) -> tuple[Group, ...]:
        """The groups whose units are dimensions of attention heads; none unless the trace asked for them."""
        return tuple(group for group in self.groups if group.name in self._assembled.head_sizes)

    @property
    def slots(self) -> dict[str, int]:
        """By group the number of its first unit, counted through all groups as `costs` counts them."""
        found, offset = {}, 0
        for group in self._assembled.groups:
            found[group.name] = offset
            offset += group.size
        return found

    @property
    def costs_follow_data(self) -> bool:
        """Whether MACs depend on values of the inputs, as where each expert gets the tokens that chose it."""
        return bool(nodes_of_data(self.program))

    @property
    def costs(self) -> CostModel:
        """What any choice of units costs, as sums of products of sizes."""
        return self._costs

    def restricted_to(self, groups: Sequence[Group]) -> Graph:
        """The same model with some of its groups alone: no unit of the others may be removed."""
        return replace(self, groups=tuple(groups))

    def with_costs(self, costs: CostModel) -> Graph:
        """The same model with other costs, of the same slots."""
        return replace(self, _costs=costs)

    def kept(self, removed: Removed, view: View | None = None) -> Kept:
        """Which positions of each tensor in the program stay once positions of parameters are removed.

        Args:
            removed: Name of a tensor -> axis -> the positions that are removed.
            view: One of `views`, to ask about its program; None for the forward pass.

        Raises:
            ApplyError: More has to be removed together with these positions.
        """
        return self._labelled[view].kept(removed)

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a node of the program is computed from parameters, buffers and constants alone."""
        return node in self._labelled[None]._walk.weights.computed

    def origin(self, node: fx.Node) -> str:
        """The name of the one tensor that a node is, or is computed from; empty if there is no single one."""
        names = self._labelled[None]._walk.names
        while node not in names:
            if len(node.all_input_nodes) != 1:
                return ""
            node = node.all_input_nodes[0]
        return names[node]

    def coverage(self) -> Coverage:
        """Say for every parameter whether it is prunable, protected or frozen, and why."""
        walk, tensors = self._labelled[None]._walk, self._labelled[None]._tensors
        sizes = {t.name: tensor_of(self.program, t.name).numel() for t in tensors}
        return coverage_of(walk, self._assembled, tensors, sizes, self.inputs)

    def spread(self, by_group: Mapping[str, NDArray[Any]], slots: NDArray[Any]) -> None:
        """Write the vector of each group, [group.size], to its place among the units of all groups."""
        known = {g.name: g for g in self.groups}
        starts = self.slots
        for name, values in by_group.items():
            if name not in known:
                raise PlanError(f"group {name!r}: expected one of the model's {len(known)} prunable groups.")
            if values.shape != (known[name].size,):
                raise PlanError(
                    f"group {name!r}: expected a mask of {known[name].size} units, got {values.shape}."
                )
            slots[starts[name] : starts[name] + len(values)] = values

    def cost(self, keep: Mapping[str, NDArray[np.bool_]] | None = None) -> Cost:
        """Parameters, and MACs of one sample, once a choice of units is removed.

        Args:
            keep: By group name, True for each unit that stays. [group.size] Groups not named stay whole.

        Raises:
            PlanError: If a name is no prunable group, or a mask has another size than its group.
        """
        slots = np.ones(self._costs.slots, dtype=bool)
        self.spread(keep or {}, slots)
        return self._costs.cost(slots)

    def sweep(
        self, gone: Mapping[str, NDArray[np.int64]], stages: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters, and MACs of one sample, at every stage of a removal: the same as `cost`, but faster.

        Args:
            gone: By group name, the first stage without each unit; a unit with `stages` or more is never
                removed. [group.size] Groups that are not named stay whole.
            stages: Number of stages.

        Returns:
            Parameters and MACs. [stages] each

        Raises:
            PlanError: If a name is no prunable group, or a vector has another size than its group.
        """
        slots = np.full(self._costs.slots, stages, dtype=np.int64)
        self.spread(gone, slots)
        return self._costs.sweep(slots, stages)

    def __str__(self) -> str:
        """A table of the groups, then everything that stays, and why."""
        width = max((len(g.name) for g in self.groups), default=5)
        lines = [f"{'group':{width}}  units  layers that produce them"]
        for group in self.groups:
            producers = list(dict.fromkeys(s.tensor for s in group.of_role("produce")))
            lines.append(f"{group.name:{width}}  {group.size:5}  {', '.join(producers)}")
        lines += [f"kept: {left.group.name} ({left.group.size}): {left.reason}" for left in self.left]
        for f in self.frozen:
            lines.append(
                f"kept: {f.tensor} axis {f.axis} ({f.count}): {f.reason}{' at ' + f.where if f.where else ''}"
            )
        return "\n".join([*lines, self.inputs.describe()])
