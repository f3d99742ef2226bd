"""A model's experts as groups of units: what `trace` is for channels, without capturing the program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.allocators.base import Allocator
from secateur.allocators.limits import Limits
from secateur.common.models import device_of, named_tensors
from secateur.errors import PlanError
from secateur.graph.costs import CostModel, Term
from secateur.graph.folding import folded
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.groups import Frozen, Group, Left, Slice, group_called
from secateur.graph.inputs import InputSpec
from secateur.measure.cost import Cost
from secateur.targets.experts.allocate import Grouped, within
from secateur.targets.experts.blocks import Block


@dataclass(frozen=True)
class ExpertCost(Cost):
    """Parameters, MACs of one sample, and routed experts.

    MACs fall by what the router spends on a removed expert and by no more: every token still uses as many
    experts as before.

    Attributes:
        experts: Routed experts in all blocks.
    """

    experts: int


@dataclass(frozen=True, eq=False)
class ExpertGraph:
    """The experts of a model; one group a block, named after it, one unit an expert.

    `sc.trace` makes it for granularity ``expert``; rules, `sc.score` and `sc.apply` take it like a `Graph`.

    Attributes:
        blocks: The blocks whose experts may be removed, in order.
        groups: The same as groups of units.
        left: Sets of experts that are left alone, and why.
        frozen: Nothing; a `Graph` has it. So it is with `folded`.
        model: The model itself, not a copy.
        fingerprint: Hash of the model's state-dict names and shapes.
        inputs: Shapes and dtypes of the example inputs.
        dense: What the whole model costs.
        proven: Whether a forward pass has shown what a removal does; it cannot on the meta device.
        each: What goes with one expert, by block.
        tokens: How many tokens a router reads for one sample.
    """

    granularity: ClassVar[Literal["expert"]] = "expert"

    blocks: tuple[Block, ...]
    groups: tuple[Group, ...]
    left: tuple[Left, ...]
    model: nn.Module = field(repr=False)
    fingerprint: str
    inputs: InputSpec
    dense: ExpertCost
    proven: bool
    each: Mapping[str, ExpertCost] = field(repr=False)
    tokens: int
    frozen: tuple[Frozen, ...] = ()
    folded: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Group:
        """The group of this name."""
        return group_called(self.groups, name)

    @property
    def device(self) -> torch.device:
        """Where the model's first tensor lives."""
        return device_of(self.model)

    def adapted(self, rule: Allocator, limits: Limits) -> tuple[Allocator, Limits]:
        """The rule and the limits, so that every router can work with what they leave."""
        grouped = any(block.routing_groups > 1 for block in self.blocks)
        return (Grouped(rule, self) if grouped else rule), within(self.blocks, limits)

    def block(self, name: str) -> Block:
        """The block of this name.

        Raises:
            PlanError: There is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise PlanError(f"experts {name!r}: expected one of the model's {len(self.blocks)} blocks, got none.")

    def router_matrices(self, block: Block) -> tuple[str, ...]:
        """Names of the matrices of a block's router. [experts, width]"""
        return tuple(name for name, p in _router(self.model, block).items() if p.ndim == 2)

    def cost(self, keep: Mapping[str, NDArray[np.bool_]] | None = None) -> ExpertCost:
        """The cost with `keep` [group.size] by group name; unnamed groups stay.

        Raises:
            PlanError: A name is no group, or a mask has another size than its group.
        """
        gone = {name: np.where(mask, 1, 0) for name, mask in (keep or {}).items()}
        columns = self._sweep(gone, 1)
        return ExpertCost(**{name: int(values[0]) for name, values in columns.items()})

    def sweep(
        self, gone: Mapping[str, NDArray[np.int64]], stages: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and MACs at every stage of a removal, as `Graph.sweep`. [stages] each"""
        columns = self._sweep(gone, stages)
        return columns["params"], columns["macs"]

    def _sweep(self, gone: Mapping[str, NDArray[np.int64]], stages: int) -> dict[str, NDArray[np.int64]]:
        found = {name: np.full(stages, value, dtype=np.int64) for name, value in vars(self.dense).items()}
        for name, when in gone.items():
            if when.shape != (self.block(name).count,):
                raise PlanError(
                    f"experts {name!r}: expected a mask of {self.block(name).count} experts, got "
                    f"{when.shape}."
                )
            removed = (when[None, :] <= np.arange(stages)[:, None]).sum(axis=1)
            for column, value in vars(self.each[name]).items():
                found[column] -= value * removed
        return found

    def priced(self, units: Graph, costs: CostModel, starts: Mapping[str, int]) -> dict[str, list[Term]]:
        """Return the terms of the units' costs, changed so that they also depend on which experts stay.

        Args:
            units: The trace of the units.
            costs: Where axes are added.
            starts: The slot of the first expert of each block.
        """
        shapes = {name: p.shape for name, p in folded(self.model, units.folded).named_parameters()}
        routed = {name: self.tokens for block in self.blocks for name in self.router_matrices(block)}
        pieces: dict[str, list[tuple[int, Slice]]] = {}
        for group in self.groups:
            for piece in group.slices:
                pieces.setdefault(piece.tensor, []).append((starts[group.name], piece))
        found: dict[str, list[Term]] = {"params": [], "macs": units.costs.terms("macs")}
        for term in units.costs.terms("params"):
            axes = [*term.axes]
            for start, piece in pieces.get(term.origin, ()):
                if len(np.unique(piece.unit)) == 1:  # the whole tensor belongs to one expert
                    axes.append(costs.axis(start + piece.unit[:1]))
                    continue
                along = np.full(shapes[term.origin][piece.axis], -1, dtype=np.int64)
                along[piece.position] = start + piece.unit
                axes[piece.axis] = costs.axis(along)
            found["params"].append(term._replace(axes=tuple(axes)))
            factor = routed.get(term.origin, 0) * costs.batch
            if factor:  # what a router spends on the experts that stay, less what it would on all
                found["macs"] += [Term(factor, tuple(axes)), Term(-factor, term.axes)]
        return found

    def __str__(self) -> str:
        """A table of the blocks, then what is left alone and why."""
        width = max(len(b.name) for b in self.blocks)
        lines = [f"{'block':{width}}  experts  a token uses  fewest  router"]
        lines += [
            f"{b.name:{width}}  {b.count:7}  {b.top_k or '?':>12}  {b.min_keep:6}  {b.router}"
            for b in self.blocks
        ]
        return "\n".join([*lines, *(f"kept: {x.group.name} ({x.group.size}): {x.reason}" for x in self.left)])


def build(
    model: nn.Module,
    blocks: Iterable[Block],
    left: Iterable[tuple[Block, str]],
    inputs: InputSpec,
    *,
    macs: int,
    tokens: int,
    proven: bool,
) -> ExpertGraph:
    """The graph of these blocks.

    Args:
        model: The model.
        blocks: What may be removed from.
        left: What may not, with reasons.
        inputs: The example inputs.
        macs: Of one sample.
        tokens: That a block reads for one sample.
        proven: Whether removals were tried.
    """
    blocks = tuple(blocks)
    params = sum(p.numel() for p in model.parameters())
    return ExpertGraph(
        blocks=blocks,
        groups=tuple(group_of(model, block) for block in blocks),
        left=tuple(Left(group_of(model, block), reason) for block, reason in left),
        model=model,
        fingerprint=fingerprint(model),
        inputs=inputs,
        dense=ExpertCost(params, macs, sum(b.count for b in blocks)),
        proven=proven,
        each={b.name: _each(model, b, tokens) for b in blocks},
        tokens=tokens,
    )


def group_of(model: nn.Module, block: Block) -> Group:
    """The block's experts as units.

    A list of modules loses whole modules: each of their tensors loses every position of its axis 0.
    """
    units = np.arange(block.count)
    slices = [Slice(tensor, 0, "produce", units, units) for tensor in block.tensors]
    if not block.fused:
        for number, (path, expert) in enumerate(model.get_submodule(block.experts).named_children()):
            for name, tensor in named_tensors(expert).items():
                full = f"{block.experts}.{path}.{name}"
                if tensor.ndim:
                    rows = np.arange(len(tensor))
                    slices.append(Slice(full, 0, "produce", rows, np.full(len(rows), number)))
    return Group(name=block.name, size=block.count, slices=tuple(slices), sites=(), exact=True)


def expert_parameters(model: nn.Module, block: Block) -> list[tuple[str, nn.Parameter, int | None]]:
    """The experts' parameters: name, tensor, and whose it is (None: all experts', along axis 0)."""
    experts = model.get_submodule(block.experts)
    if block.fused:
        own = dict(experts.named_parameters(recurse=False))
        return [(n, p, None) for n, p in own.items() if f"{block.experts}.{n}" in block.tensors]
    return [
        (f"{path}.{name}", p, number)
        for number, (path, expert) in enumerate(experts.named_children())
        for name, p in expert.named_parameters()
    ]


def _router(model: nn.Module, block: Block) -> dict[str, nn.Parameter]:
    """The parameters with a row for each expert, by name, without those of the experts."""
    return {
        n: p
        for n, p in model.named_parameters()
        if n in block.tensors and not n.startswith(f"{block.experts}.")
    }


def _each(model: nn.Module, block: Block, tokens: int) -> ExpertCost:
    """What goes with one expert."""
    numbers = sum(p.numel() for _, p, _ in expert_parameters(model, block))
    router = _router(model, block).values()
    rows = sum(p.numel() for p in router)
    matrices = sum(p.numel() for p in router if p.ndim == 2)
    return ExpertCost((numbers + rows) // block.count, tokens * matrices // block.count, 1)
