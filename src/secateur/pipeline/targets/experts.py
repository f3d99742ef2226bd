"""The target ``expert``: experts of a mixture-of-experts model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from secateur.allocators import EMP, Budget, Global, ToD, Uniform
from secateur.allocators.base import Allocator
from secateur.allocators.registry import Allocates
from secateur.calibration import Batch, Calibration
from secateur.errors import BudgetError
from secateur.measure.evaluate import evaluate
from secateur.pipeline.result import few
from secateur.pipeline.targets.target import Scored, Target, rule_named
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.repairs.judging import MARGIN, Judge, standard_errors
from secateur.repairs.methods import Methods
from secateur.signals.experts import SIGNALS, ExpertSignal
from secateur.signals.loss import default_loss
from secateur.signals.units.combination import name_of
from secateur.targets.defaults import EXPERTS
from secateur.targets.experts.apply import FORMS, verify
from secateur.targets.experts.graph import ExpertGraph
from secateur.targets.experts.repair import METHOD, REPAIRS, check_methods, repair
from secateur.targets.experts.trace import trace
from secateur.targets.units.record import record_of, with_repairs

CANDIDATES: Mapping[str, Callable[[], Allocator]] = MappingProxyType(
    {
        "tod": lambda: ToD(removal="reap", protection="expert_taylor"),
        "tod, frequency": lambda: ToD(removal="frequency", protection="expert_taylor"),
        "emp, reap": lambda: EMP(removal="reap"),
        "global, reap": lambda: Global(removal="reap"),
        "global, frequency": lambda: Global(removal="frequency"),
        "uniform, reap": lambda: Uniform(removal="reap"),
        "uniform, frequency": lambda: Uniform(removal="frequency"),
        "uniform, output change": lambda: Uniform(removal="output_change"),
    }
)
"""The rules that ``auto`` compares."""


class Experts(Target):
    """Removes whole experts. `torch.export` need not be able to capture the model."""

    forms = FORMS
    default = "tod"
    candidates = CANDIDATES
    compared = tuple(EXPERTS)
    budgets = (Budget(experts=0.75), Budget(experts=0.5))
    refused: ClassVar[Mapping[str, str]] = {
        "allow_inexact": "only experts whose removal is exact may go",
        "on_unrealisable": "a module can express every removal of experts",
    }
    graph: ExpertGraph

    @staticmethod
    def rule(allocator: Any) -> Any:
        """Return the rule with this name, with signals for experts, or the rule itself."""
        return rule_named(allocator, EXPERTS, 'ToD(removal="reap", protection="frequency")')

    @staticmethod
    def check_repair(repair: Methods) -> None:
        """Accept None, ``auto``, ``experts``, ``merge``, and ``merge`` followed by ``experts``."""
        check_methods("prune(granularity='expert', repair", repair)

    def trace(self, model: nn.Module) -> ExpertGraph:
        """Find the blocks of experts of a model."""
        return trace(model, self.task.example.inputs)

    def score_candidates(self, rules: Iterable[Allocates]) -> Scored:
        """Score the experts. Without labels, signals that need gradients are left out."""
        return self.score_as_labels_allow(rules, SIGNALS, ExpertSignal)

    def default_budget(self, scored: Scored) -> Budget:
        """Return the share of experts that ``tod`` keeps with its default tolerance."""
        rule = CANDIDATES["tod"]()
        if any(name_of(signal) not in scored.scores for signal in rule.signals):
            raise BudgetError(
                "auto: expected a budget, or labels for tod to decide on one, got neither. Pass a budget: "
                "Budget(experts=0.75), for example."
            )
        groups = self.allocate(rule, scored.scores, None).groups
        return Budget(experts=sum(g.kept for g in groups) / sum(g.size for g in groups))

    def judge(self) -> Judge:
        """Judge by the model's own loss if batches have labels for it: it says more for language models."""
        task = self.task
        if task.loss_fn is not None or task.example.extra is None:
            return super().judge()

        def own(model: Any, raw: Any) -> Tensor:
            batch = Batch.of(raw, reading=task.example.reading)
            return default_loss(batch.run(model, labelled=True), batch)

        return Judge(task.model, task.held, own)

    @property
    def candidate_repair(self) -> str:
        """Names of the requested repairs; ``experts`` for ``auto``."""
        return " + ".join(check_methods("prune(repair", self.task.repair))

    def candidate(self, plan: Plan, data: Calibration) -> nn.Module:
        """Apply a plan, and repair the result on `data` without measuring it."""
        return self._refitted(self.apply(plan), data)

    def repair_between_rounds(self, small: nn.Module) -> nn.Module:
        """Repair a model between two rounds in the same way as the result."""
        return self._refitted(small, self.task.fit)

    def _refitted(self, small: nn.Module, data: Calibration) -> nn.Module:
        task = self.task
        if task.repair is None:
            return small
        return repair(small, task.model, data, task.repair, graph=self.graph, seed=task.seed, progress=False)

    def budget_in_round(self, graph: ExpertGraph, so_far: Plan, budget: Budget) -> Budget:
        """Subtract the experts of blocks that can lose no more: this round's graph lacks these blocks."""
        if budget.experts is None:
            return budget
        names = {group.name for group in graph.groups}
        rest = sum(group.kept for group in so_far.groups if group.name not in names)
        return replace(budget, experts=max(1, int(budget.experts) - rest))

    def unmatched_groups(self, groups: Iterable[Any], so_far: Plan) -> tuple[str, ...]:
        """None: blocks keep their names and experts their order, so all are known in the dense model."""
        return ()

    def compose(self, so_far: Plan, later: Plan) -> Plan:
        """Combine two plans by the experts' numbers; tensor names may differ from round to round."""
        keep = so_far.keep
        for group in later.groups:
            mask = keep[group.name]
            mask[np.flatnonzero(mask)[list(group.removed)]] = False
        return Plan.build(
            self.graph,
            keep,
            allocator=later.allocator,
            settings=later.settings,
            seed=later.seed,
            budget=later.budget,
        )

    def verify(self, small: nn.Module, plan: Plan) -> Proof:
        """Compare with the dense model whose routers may not choose the removed experts."""
        return verify(self.task.model, small, plan, few(self.task.example, None), graph=self.graph)

    def repaired(self, small: nn.Module, plan: Plan) -> nn.Module:
        """Run the requested repair; keep it if the held-out loss does not rise.

        With ``merge`` and ``experts``, the merge must also be clearly better than the refit alone.
        """
        task = self.task
        if task.repair is None:
            return small

        def by(methods: Methods) -> nn.Module:
            return repair(
                small, task.model, task.fit, methods, graph=self.graph, seed=task.seed, progress=task.progress
            )

        if check_methods("repair", task.repair) != REPAIRS:
            return self.accepted(small, by(task.repair))
        alone, merged = self.accepted(small, by(METHOD)), by(REPAIRS)
        judge = self.judge()
        if standard_errors(judge(merged) - judge(alone)) < -MARGIN:
            return merged
        tried = record_of(merged).repairs[len(record_of(small).repairs)]
        return with_repairs(alone, [{**tried, "kept": False}])

    def accepted(self, small: nn.Module, better: nn.Module) -> nn.Module:
        """Return `better` if the held-out loss does not rise; else `small`, with a record of the attempt."""
        task = self.task
        tried = record_of(better).repairs[len(record_of(small).repairs) :]
        before, after = (
            evaluate(model, task.held, dense=task.model, loss_fn=task.loss_fn, progress=task.progress).loss
            for model in (small, better)
        )
        for entry in tried:
            entry["kept"] = entry["kept"] and after <= before
        return better if any(entry["kept"] for entry in tried) else with_repairs(small, list(tried))
