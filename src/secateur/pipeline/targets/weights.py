"""The pruning target for single weights: masks instead of smaller layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from torch import nn

from secateur.allocators import EMP, ERK, LAMP, Allocator, Budget, Limits, Repairability, Uniform, resolve
from secateur.allocators.registry import Allocates
from secateur.calibration import Calibration
from secateur.errors import ScoreError, SettingError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.measure.cost import Cost
from secateur.pipeline.auto.auto import Auto
from secateur.pipeline.targets.target import Scored, Target
from secateur.proof.verify import Proof
from secateur.repairs.methods import Method, Methods, Repair, Work, listed, name_of_repair, quick
from secateur.repairs.methods import resolve as resolve_repairs
from secateur.report.collect import histograms
from secateur.report.data import Layer
from secateur.signals import Scores
from secateur.signals.units.combination import name_of
from secateur.signals.weights.score import CRITERIA, leaves
from secateur.targets.weights.apply import FORMS, verify
from secateur.targets.weights.distortion import with_curves
from secateur.targets.weights.plan import MaskPlan
from secateur.targets.weights.surgeon import surgeon
from secateur.targets.weights.weights import Weights
from secateur.targets.weights.weights import trace as weights_of

CANDIDATES: Mapping[str, Callable[[], Allocates]] = MappingProxyType(
    {
        "emp": EMP,
        "emp, wanda": lambda: EMP(removal="wanda"),
        "repairability": Repairability,
        "repairability, wanda": lambda: Repairability(removal="wanda"),
        "erk": ERK,
        "erk, wanda": lambda: ERK(removal="wanda"),
        "lamp": LAMP,
        "uniform, wanda": lambda: Uniform(removal="wanda"),
    }
)
"""Allocators that ``auto`` compares. At a given sparsity EMP uses one threshold for all weights."""

_SAME_SHAPES = "masks leave all shapes as they are"


class SingleWeights(Target):
    """Prunes single weights of linear layers and convolutions: they become zero, and all shapes stay."""

    forms = FORMS
    default = "emp"
    candidates = CANDIDATES
    compared = ("repairability", "emp", "erk", "lamp", "uniform", "random")
    budgets = (Budget(sparsity=0.5), Budget(sparsity=0.7), Budget(sparsity=0.9))
    refused: ClassVar[Mapping[str, str]] = {
        "steps": "rounds trace a smaller model anew, and masks leave the shapes as they are",
        "allow_inexact": _SAME_SHAPES,
        "on_unrealisable": _SAME_SHAPES,
        "latency": "zeros are multiplied like any other number, so masks save no time",
        "memory": "zeros are stored like any other number, so masks save no memory",
        "measure_latency": "zeros are multiplied like any other number, so masks save no time",
    }
    graph: Graph

    @staticmethod
    def rule(allocator: Any) -> Any:
        """Resolve an allocator, and check that single weights have all its signals."""
        found = resolve(allocator, also=(Auto.name,))
        for signal in found.signals:
            try:
                leaves([signal])
            except ScoreError as error:
                raise SettingError(
                    f"prune: expected a rule that reads {', '.join(CRITERIA)} of single weights, got "
                    f'{name_of(signal)!r}. Set its removal signal: removal="wanda", for example.'
                ) from error
        return found

    @staticmethod
    def check_repair(repair: Methods) -> None:
        """Check the names of repairs: those of `sc.repair`, and ``surgeon``."""
        resolve_repairs(repair, {"surgeon": Repair("surgeon", lambda small, work: None)})

    @cached_property
    def prunable(self) -> Weights:
        """The weights that masks can cover: those of linear layers and convolutions."""
        return weights_of(self.task.model)

    def trace(self, model: nn.Module) -> Graph:
        """Trace the model. Only repairs need the trace, so inexact groups are allowed."""
        return trace(model, self.task.example.inputs, allow_inexact=True)

    def score_candidates(self, rules: Iterable[Allocates]) -> Scored:
        """Score for these allocators and for ``emp``, which decides the default budget."""
        return Scored(self.score([*rules, EMP()]))

    @staticmethod
    def with_curves(rule: Any, graph: Weights, data: Any, scores: Scores, *, progress: bool = False) -> Any:
        """Return the rule with the distortion curves that `Repairability` measures on data."""
        return with_curves(rule, graph.model, data, scores, progress=progress)

    def allocate(
        self, rule: Any, scores: Scores, budget: Budget | None, limits: Limits | None = None
    ) -> MaskPlan:
        """Make the masks. Only a subclass of `Allocator` can do that."""
        if not isinstance(rule, Allocator):
            raise SettingError(
                f"masks: expected a rule for single weights, got {rule!r}, which is no "
                "sc.Allocator. Derive its class from sc.Allocator."
            )
        plan: MaskPlan = super().allocate(rule, scores, budget, limits)
        return plan

    def default_budget(self, scored: Scored) -> Budget:
        """The sparsity that ``emp`` chooses without a budget."""
        return Budget(sparsity=self.allocate(EMP(), scored.scores, None).sparsity)

    def same(self, one: MaskPlan, other: MaskPlan) -> bool:
        """Whether all masks are equal."""
        return all(np.array_equal(mask, other.masks[name]) for name, mask in one.masks.items())

    @property
    def _repairs(self) -> tuple[str | Method, ...]:
        """The repairs that candidates get: none that train, and ``reconstruct`` for ``auto``."""
        repairs = "reconstruct" if self.task.repair == "auto" else quick(self.task.repair)
        return () if repairs is None else listed(repairs)

    @property
    def candidate_repair(self) -> str:
        """Names of the repairs that candidates get, joined by " + "."""
        return " + ".join(map(name_of_repair, self._repairs))

    def candidate(self, plan: MaskPlan, data: Calibration) -> nn.Module:
        """Mask the model and repair it on `data`, to be measured."""
        small = self.apply(plan)
        for method in next(iter(resolve_repairs(self._repairs, self.own_repairs(plan))), ()):
            method.run(small, Work(lambda: self.graph, data))
        return small

    def own_repairs(self, plan: MaskPlan) -> dict[str, Method]:
        """Repairs that exist only for masks: ``surgeon``. Masked weights stay zero."""

        def second_order(candidate: nn.Module, work: Work) -> dict[str, Any] | None:
            names = surgeon(candidate, self.task.model, plan, work.data, progress=work.progress)
            return {"updated": list(names)} if names else None

        return {"surgeon": Repair("surgeon", second_order)}

    def verify(self, small: nn.Module, plan: MaskPlan) -> Proof:
        """Check bit for bit that only the masked weights changed, and that they are zero."""
        return verify(self.task.model, small, plan)

    def costs(self, plan: MaskPlan) -> tuple[Cost, Cost]:
        """Cost before and after. Zeros count as removed parameters, but MACs do not change."""
        dense = self.graph.cost()
        return dense, Cost(dense.params - plan.removed, dense.macs)

    def shares(self, plan: MaskPlan) -> tuple[float | None, float]:
        """None, because masks remove no MACs; and the share of the parameters that are not zero."""
        dense, small = self.costs(plan)
        return None, small.params / dense.params

    def facts(self, small: nn.Module, plan: Any, rule: Any, scores: Scores) -> dict[str, Any]:
        """Data for the report: one entry for each masked tensor."""
        decisive = scores.only(map(name_of, rule.signals))
        layers = (
            Layer(
                group=name,
                kept=int(mask.sum()),
                total=mask.size,
                producers=(name,),
                scores=histograms(decisive, name, mask),
            )
            for name, mask in plan.masks.items()
        )
        return {"layers": tuple(layers), "untouched": ()}
