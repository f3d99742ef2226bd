"""A model's residual blocks as groups of units: what `trace` is for channels, without a captured program."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import nn

from secateur.allocators.base import Allocator
from secateur.allocators.limits import Limits
from secateur.allocators.naming import covers
from secateur.allocators.signals import ScoreTable
from secateur.allocators.step_function import StepFunction
from secateur.common.models import device_of
from secateur.errors import PlanError
from secateur.graph.costs import CostModel, Term
from secateur.graph.folding import folded
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.groups import Frozen, Group, Left, Slice, group_called
from secateur.graph.inputs import InputSpec
from secateur.measure.cost import Cost
from secateur.targets.blocks.block import Block
from secateur.targets.experts.equal import OtherRule
from secateur.targets.units.module_form.sizes import running_modules

Removal = Literal["delete", "pass"]
"""How a list loses blocks. ``delete``: they leave it. ``pass``: a `PassThrough` takes the place of each."""

_MOST_OWNERS = 8
"""The most blocks that share a tensor for which the cost of units and blocks together is exact."""


@dataclass(frozen=True)
class BlockCost(Cost):
    """Parameters, MACs of one sample, and residual blocks.

    Attributes:
        blocks: Blocks that could be dropped, as far as they are there.
    """

    blocks: int


@dataclass(frozen=True)
class Pinned(OtherRule):
    """Another rule, but some blocks have to stay: the next ones in the rule's order are removed instead.

    Attributes:
        rule: The other rule.
        units: By group, the blocks that stay.
        asked: The patterns of the user that name them.
    """

    units: Mapping[str, tuple[int, ...]]
    asked: tuple[str, ...]

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The settings of the rule, and the blocks that stay."""
        return {**self.rule.settings(knob), "stay": [*self.asked]}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The step functions of the rule, with the blocks that stay last in the order."""
        found: dict[str, Any] = {}
        for name, function in self.rule.steps(graph, scores, limits).items():
            stay = np.isin(function.order, self.units.get(name, ()))
            most = limits.removable(len(stay), int((~stay).sum()))
            order = np.concatenate([function.order[~stay], function.order[stay]])
            count = np.minimum(function.count, most)
            new = np.diff(count, prepend=0) > 0
            found[name] = StepFunction(order, function.knob[new], count[new])
        return found


@dataclass(frozen=True, eq=False)
class BlockGraph:
    """The residual blocks of a model. A group is the blocks of one network part, a unit is a block.

    `sc.trace` makes it for granularity ``block``; rules, `sc.score` and `sc.apply` take it like a `Graph`.

    Attributes:
        groups: The blocks as groups of units, in order of execution.
        blocks: The same blocks by group.
        left: Blocks that are left alone, and why.
        frozen: Nothing; a `Graph` has it. So it is with `folded`.
        model: The model itself, not a copy.
        fingerprint: Hash of the model's state-dict names and shapes.
        inputs: Shapes and dtypes of the example inputs, and which of their axes may vary.
        dense: What the whole model costs.
        each: What goes with each block, by group.
        removals: By list of blocks, how it loses blocks.
        shared: Parameters that go with the last of several blocks: these blocks, as group and place.
    """

    granularity: ClassVar[Literal["block"]] = "block"

    groups: tuple[Group, ...]
    blocks: Mapping[str, tuple[Block, ...]]
    left: tuple[Left, ...]
    model: nn.Module = field(repr=False)
    fingerprint: str
    inputs: InputSpec
    dense: BlockCost
    each: Mapping[str, tuple[BlockCost, ...]] = field(repr=False)
    removals: Mapping[str, Removal]
    shared: Mapping[tuple[tuple[str, int], ...], int] = field(default_factory=dict, repr=False)
    frozen: tuple[Frozen, ...] = ()
    folded: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Group:
        """The group of this name."""
        return group_called(self.groups, name)

    @property
    def device(self) -> torch.device:
        """Where the model's first tensor lives."""
        return device_of(self.model)

    @property
    def static_batch(self) -> int | None:
        """As for `Graph`: any batch size will do."""
        return None

    def all_blocks(self) -> list[Block]:
        """Every block that may go, group by group."""
        return [block for group in self.groups for block in self.blocks[group.name]]

    def removed(self, keep: Mapping[str, NDArray[np.bool_]]) -> list[Block]:
        """The blocks that masks remove."""
        return [
            block
            for name, mask in keep.items()
            for block, stays in zip(self.blocks[name], mask, strict=True)
            if not stays
        ]

    def adapted(self, rule: Allocator, limits: Limits) -> tuple[Allocator, Limits]:
        """The rule and the limits, changed so that single blocks named by `ignore` stay; see `staying`."""
        stay, groups = self.staying(limits)
        whole = [name for name, blocks in self.blocks.items() if {block.path for block in blocks} <= stay]
        pinned = {
            name: tuple(k for k, block in enumerate(blocks) if block.path in stay)
            for name, blocks in self.blocks.items()
        }
        asked = tuple(str(part) for part in limits.ignore)
        limits = replace(limits, ignore=(*groups, *map(glob.escape, whole)))
        return (Pinned(rule, pinned, asked) if stay else rule), limits

    def staying(self, limits: Limits) -> tuple[set[str], list[str]]:
        """Split `ignore` into the paths of single blocks that stay, and patterns for groups.

        A name of a group means the group. Any other pattern means the blocks that it covers, or of which it
        covers a layer. A pattern that covers none counts as the name of a group, so that it is reported as
        unknown.
        """
        groups, stay = [], set[str]()
        for pattern in map(str, limits.ignore):
            named = any(pattern in (name, glob.escape(name)) for name in self.blocks)
            found = {} if named else {b.path: b for b in self.all_blocks() if self._covered(pattern, b)}
            stay |= {*found}
            groups += [] if found else [pattern]
        return stay, groups

    def _covered(self, pattern: str, block: Block) -> bool:
        inner = self.model.get_submodule(block.path).named_modules(prefix=block.path)
        return any(covers(pattern, path) for path, _ in inner)

    def cost(self, keep: Mapping[str, NDArray[np.bool_]] | None = None) -> BlockCost:
        """The cost with `keep` [group.size] by group name; unnamed groups stay.

        Raises:
            PlanError: A name is no group, or a mask has another size than its group.
        """
        gone = {name: np.where(mask, 1, 0) for name, mask in (keep or {}).items()}
        return BlockCost(**{name: int(values[0]) for name, values in self._sweep(gone, 1).items()})

    def sweep(
        self, gone: Mapping[str, NDArray[np.int64]], stages: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and MACs at every stage of a removal, as `Graph.sweep`. [stages] each"""
        columns = self._sweep(gone, stages)
        return columns["params"], columns["macs"]

    def _sweep(self, gone: Mapping[str, NDArray[np.int64]], stages: int) -> dict[str, NDArray[np.int64]]:
        found = {name: np.full(stages, value, dtype=np.int64) for name, value in vars(self.dense).items()}
        for name, when in gone.items():
            if name not in self.each or when.shape != (len(self.each[name]),):
                raise PlanError(
                    f"blocks {name!r}: expected a mask for one of {[*self.each]}, of one entry a block, got "
                    f"one of shape {when.shape}."
                )
            for cost, stage in zip(self.each[name], when, strict=True):
                for column, value in vars(cost).items():
                    found[column][max(int(stage), 0) :] -= value
        for places, value in self.shared.items():
            last = max(int(gone[name][k]) if name in gone else stages for name, k in places)
            found["params"][max(last, 0) :] -= value
        return found

    def priced(self, units: Graph, costs: CostModel, starts: Mapping[str, int]) -> dict[str, list[Term]]:
        """The terms of the units' costs, which are zero where the block that they are of is gone.

        Args:
            units: The trace of the units.
            costs: Where axes are added.
            starts: The slot of the first block of each group.
        """
        axes = {
            block.path: costs.axis(np.array([starts[name] + number]))
            for name, blocks in self.blocks.items()
            for number, block in enumerate(blocks)
        }
        nodes = {
            node.name: path
            for node in units.program.graph.nodes
            for path in running_modules(node)
            if path in axes
        }
        owners = _blocks_of_parameters(folded(self.model, units.folded), [*axes])
        macs = {name: (path,) for name, path in nodes.items()}
        return {
            kind: [
                new
                for term in units.costs.terms(kind)
                for new in _while_any(term, [axes[path] for path in inside.get(term.origin, ())])
            ]
            for kind, inside in (("params", owners), ("macs", macs))
        }

    def __str__(self) -> str:
        """A table of the blocks, then what is left alone and why."""
        blocks = self.all_blocks()
        width = max(len(b.path) for b in blocks)
        lines = [f"{'block':{width}}      params        MACs  group"]
        for group in self.groups:
            for block, cost in zip(self.blocks[group.name], self.each[group.name], strict=True):
                lines.append(f"{block.path:{width}}  {cost.params:10,}  {cost.macs:10,}  {group.name}")
        return "\n".join([*lines, *(f"kept: {x.group.name}: {x.reason}" for x in self.left)])


def build(
    model: nn.Module,
    blocks: Iterable[Block],
    left: Mapping[str, str],
    inputs: InputSpec,
    costs: Mapping[str, int],
    macs: int,
    removals: Mapping[str, Removal],
) -> BlockGraph:
    """The graph of these blocks.

    Args:
        model: The model.
        blocks: What may be removed, in order of execution.
        left: What may not, with reasons, by path.
        inputs: The example inputs.
        costs: MACs of each block for one sample, by path.
        macs: Of the whole model.
        removals: By list of blocks, how it loses blocks.
    """
    parts: dict[str, list[Block]] = {}
    for block in blocks:
        parts.setdefault(_part(block.container), []).append(block)
    named: dict[str, tuple[Block, ...]] = {}
    for found in parts.values():
        name = _name(found)
        named[f"{name}#2" if name in named else name] = tuple(found)  # the root's list, and one of its name
    reasons = dict(left)
    for name, some in list(named.items()):
        if len(some) == 1:
            reasons[some[0].path] = "it is the only block of this part of the network"
            del named[name]
    places = {block.path: (name, k) for name, found in named.items() for k, block in enumerate(found)}
    owned = _owned_parameters(model, [*places])
    each = {
        name: tuple(BlockCost(owned.pop((b.path,), 0), costs.get(b.path, 0), 1) for b in found)
        for name, found in named.items()
    }
    whole = sum(p.numel() for p in model.parameters())
    return BlockGraph(
        groups=tuple(_group(name, found) for name, found in named.items()),
        blocks=named,
        left=tuple(Left(Group(path, 1, (), (), exact=True), reason) for path, reason in reasons.items()),
        model=model,
        fingerprint=fingerprint(model),
        inputs=inputs,
        dense=BlockCost(whole, macs, sum(map(len, named.values()))),
        each=each,
        removals=removals,
        shared={tuple(map(places.__getitem__, paths)): count for paths, count in owned.items()},
    )


def _while_any(term: Term, blocks: Sequence[int]) -> Iterator[Term]:
    """Yield terms whose sum is the given one while any of these blocks stays, and 0 without them.

    Each size of `blocks` is 0 or 1, so this is inclusion and exclusion. With more than `_MOST_OWNERS` blocks
    the term stays as it is, which is too much where all of them go.
    """
    if not blocks or len(blocks) > _MOST_OWNERS:
        yield term
        return
    for number in range(1, len(blocks) + 1):
        sign = 1 if number % 2 else -1
        for some in combinations(blocks, number):
            yield term._replace(factor=sign * term.factor, axes=(*term.axes, *some))


def _part(container: str) -> str:
    """Stages of a network, such as ``layer1`` and ``layer2``, or lists in such, are one part."""
    return re.sub(r"\d+", "*", container)


def _name(blocks: list[Block]) -> str:
    containers = dict.fromkeys(block.container for block in blocks)
    return _part(blocks[0].container) if len(containers) > 1 else (blocks[0].container or "blocks")


def _group(name: str, blocks: tuple[Block, ...]) -> Group:
    """The group: each block is one position of a slice of its own, named after its module."""
    slices = tuple(
        Slice(block.path, 0, "block", np.zeros(1, np.int64), np.full(1, number))
        for number, block in enumerate(blocks)
    )
    return Group(name=name, size=len(blocks), slices=slices, sites=(), exact=True)


def _owned_parameters(model: nn.Module, paths: list[str]) -> dict[tuple[str, ...], int]:
    """Count the parameters that belong to blocks only, by the paths of the blocks that have them."""
    found: dict[tuple[str, ...], int] = {}
    owners = _blocks_of_parameters(model, paths)
    for name, parameter in model.named_parameters():
        if name in owners:
            found[owners[name]] = found.get(owners[name], 0) + parameter.numel()
    return found


def _blocks_of_parameters(model: nn.Module, paths: list[str]) -> dict[str, tuple[str, ...]]:
    """For each parameter of blocks only, by name, the paths of the blocks that have it."""
    inside: dict[str, str] = {}
    for path in paths:
        module = model.get_submodule(path)
        inside |= {name: path for name, _ in module.named_parameters(path, remove_duplicate=False)}
    modules: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        modules.setdefault(id(parameter), set()).add(inside.get(name, ""))
    owners = {name: tuple(sorted(modules[id(p)])) for name, p in model.named_parameters()}
    return {name: found for name, found in owners.items() if "" not in found}
