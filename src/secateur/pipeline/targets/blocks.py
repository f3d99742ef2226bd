"""The target ``block``: residual blocks."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.allocators import EMP, Budget, Global, Limits, ToD, Uniform
from secateur.allocators.base import Allocator
from secateur.allocators.registry import Allocates
from secateur.calibration import Batch, Calibration
from secateur.graph.graph import Graph
from secateur.pipeline.result import few
from secateur.pipeline.targets.target import Scored, Target, rule_named
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.repairs.methods import Methods, quick
from secateur.repairs.methods import resolve as resolve_repairs
from secateur.signals.blocks import SIGNALS, BlockSignal
from secateur.targets.blocks.apply import FORMS, apply, verify
from secateur.targets.blocks.graph import BlockGraph
from secateur.targets.blocks.remove import names_after, removed_paths
from secateur.targets.blocks.repair import refitted, repaired
from secateur.targets.blocks.trace import trace
from secateur.targets.defaults import BLOCKS

CANDIDATES: Mapping[str, Callable[[], Allocator]] = MappingProxyType(
    {
        "global, output change": lambda: Global(removal="output_change"),
        "global, stream change": lambda: Global(removal="stream_change"),
        "global, stream distance": lambda: Global(removal="stream_distance"),
        "tod": lambda: ToD(removal="output_change", protection="block_taylor"),
        "emp, output change": lambda: EMP(removal="output_change"),
        "uniform, output change": lambda: Uniform(removal="output_change"),
    }
)
"""The rules that ``auto`` compares."""

_LOOKED_AT, _SHAPES = 64, 4
"""Number of batches that are searched for inputs of other shapes, and the most other shapes that are used."""


class Blocks(Target):
    """Removes whole residual blocks. `torch.export` need not be able to capture the model."""

    forms = FORMS
    default = "auto"
    candidates = CANDIDATES
    compared = tuple(BLOCKS)
    budgets = (Budget(blocks=0.75), Budget(blocks=0.5))
    refused: ClassVar[Mapping[str, str]] = {
        "allow_inexact": "only blocks whose removal is exact may go",
        "on_unrealisable": "only blocks that a module can lose may go",
    }
    graph: BlockGraph

    @staticmethod
    def rule(allocator: Any) -> Any:
        """Return the rule with this name, with signals for blocks, or the rule itself."""
        return rule_named(allocator, BLOCKS, 'Global(removal="stream_change")', "auto, ")

    @cached_property
    def _others(self) -> list[Any]:
        """Further inputs: one batch of each of a few other shapes, and two other batches.

        Which code a model runs may depend on shapes and values. So may whether a block can be bypassed.
        """
        shapes: dict[Any, Batch] = {}
        found = list(islice(self.task.data, _LOOKED_AT))
        for batch in found:
            tensors = [t for t in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
            shape = tuple(t.shape[1:] for t in tensors)
            shapes.setdefault((sum(s.numel() for s in shape), shape), batch)
        others = [batch for _, batch in sorted(shapes.items(), key=lambda item: item[0])]
        kept = [*others[: _SHAPES // 2], *others[_SHAPES // 2 :][-(_SHAPES - _SHAPES // 2) :]]
        return [few(batch, None) for batch in (*kept, *found[1:2], *found[-1:])]

    @staticmethod
    def check_repair(repair: Methods) -> None:
        """Check that `sc.repair` has these repairs."""
        resolve_repairs(repair)

    def trace(self, model: nn.Module) -> BlockGraph:
        """Find the residual blocks of a model."""
        return trace(model, few(self.task.example, None), more_inputs=self._others[:-1])

    def score_candidates(self, rules: Iterable[Allocates]) -> Scored:
        """Score the blocks. Without labels, signals that need gradients are left out."""
        return self.score_as_labels_allow(rules, SIGNALS, BlockSignal)

    def default_budget(self, scored: Scored) -> Budget:
        """Return the parameters that ``emp`` leaves without a budget."""
        return Budget(params=self.allocate(BLOCKS["emp"], scored.scores, None).predicted.params)

    @cached_property
    def _program(self) -> list[Graph]:
        """Where repairs keep the trace of the dense model's units, so that it is made only once."""
        return []

    @property
    def _quick(self) -> Methods:
        """The requested repairs without those that train; ``reconstruct`` for ``auto``."""
        repair = self.task.repair
        return "reconstruct" if repair == "auto" else quick(repair)

    @property
    def candidate_repair(self) -> str:
        """Names of the repairs that candidates get."""
        return " + ".join(method.name for some in resolve_repairs(self._quick) for method in some)

    def candidate(self, plan: Plan, data: Calibration) -> nn.Module:
        """Apply a plan, and repair the result on `data` without measuring it."""
        return self._refitted(self.apply(plan), data)

    def repair_between_rounds(self, small: nn.Module) -> nn.Module:
        """Repair a model between two rounds, as `candidate` does."""
        return self._refitted(small, self.task.fit)

    def _refitted(self, small: nn.Module, data: Calibration) -> nn.Module:
        model, how = self.task.model, self._quick
        return refitted(small, model, data, how, graph=self.graph, program=self._program)

    def budget_in_round(self, graph: Any, so_far: Plan, budget: Budget) -> Budget:
        """Subtract the last block of each chain: it cannot be removed, so this round's graph lacks it."""
        if budget.blocks is None:
            return budget
        rest = sum(group.kept for group in so_far.groups) - graph.dense.blocks
        return replace(budget, blocks=max(1, int(budget.blocks) - rest))

    def limits_in_round(self, graph: Any, so_far: Plan, limits: Limits | None) -> Limits | None:
        """Replace the ignored blocks by the paths that they have in a later round's model."""
        if limits is None or not limits.ignore:
            return limits
        stay, patterns = self.graph.staying(limits)
        stay |= {
            block.path
            for name, blocks in self.graph.blocks.items()
            if any(pattern in (name, glob.escape(name)) for pattern in patterns)
            for block in blocks
        }
        known = {block.path for block in graph.all_blocks()}
        now = [new for old, new in self._paths_after(so_far).items() if old in stay and new in known]
        return replace(limits, ignore=tuple(map(glob.escape, now)))

    def _paths_after(self, so_far: Plan) -> dict[str, str]:
        """Map the path of each remaining block in the dense model to its path after these rounds."""
        before = removed_paths(so_far)
        passing = [path for path in before if self.graph.removals.get(path.rpartition(".")[0]) == "pass"]
        return names_after(
            self.task.model, [block.path for block in self.graph.all_blocks()], before, passing
        )

    def unmatched_groups(self, groups: Iterable[Any], so_far: Plan) -> tuple[str, ...]:
        """None: the remaining blocks keep their order, so all are known in the dense model."""
        return ()

    def compose(self, so_far: Plan, later: Plan) -> Plan:
        """Combine two plans by the blocks' paths in the dense model; a later round has other paths."""
        later_gone = {*removed_paths(later)}
        gone = {old for old, new in self._paths_after(so_far).items() if new in later_gone}
        gone |= {*removed_paths(so_far)}
        keep = {
            name: np.array([block.path not in gone for block in blocks])
            for name, blocks in self.graph.blocks.items()
        }
        return Plan.build(
            self.graph,
            keep,
            allocator=later.allocator,
            settings=later.settings,
            seed=later.seed,
            budget=later.budget,
        )

    def apply(self, plan: Plan) -> nn.Module:
        """Apply a plan: return the model without these blocks."""
        return apply(self.task.model, plan, graph=self.graph)

    def verify(self, small: nn.Module, plan: Plan) -> Proof:
        """Compare with the dense model in which the removed blocks are bypassed."""
        example = few(self.task.example, None)
        return verify(self.task.model, small, plan, example, graph=self.graph, more_inputs=self._others)

    def repaired(self, small: nn.Module, plan: Plan) -> nn.Module:
        """Run the requested repair, and keep what lowers the error on held-out data."""
        task = self.task
        return repaired(
            small,
            task.model,
            task.data,
            task.repair,
            self._program,
            self.graph,
            loss_fn=task.loss_fn,
            seed=task.seed,
            progress=task.progress,
        )
