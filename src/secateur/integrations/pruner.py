"""`GradualPruner`: prune a model in rounds while any training loop trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from secateur.allocators import Budget, Limits, resolve
from secateur.allocators.registry import Allocates
from secateur.allocators.unit_distortions import with_unit_curves
from secateur.calibration import Calibration, Forward
from secateur.common.models import device_of, named_tensors, unwrap
from secateur.compat.training import own_forward
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.integrations.optimizers import carry, moves
from secateur.integrations.replacing import replace_parameters
from secateur.integrations.schedule import Schedule
from secateur.integrations.shapes import ROUNDS, pruned_record, rounds_of
from secateur.integrations.wrappers import check_whole, refresh
from secateur.measure.cost import Cost
from secateur.pipeline.expressible import limits_ignoring, plan_until_expressible
from secateur.plan import Plan
from secateur.repairs.methods import resolve as resolve_repairs
from secateur.repairs.repair import repair as repair_model
from secateur.signals import Scores, score
from secateur.signals.distributed import team_of_processes
from secateur.signals.loss import LossFn
from secateur.targets.units.apply import Applier
from secateur.targets.units.composing import compose, split
from secateur.targets.units.record import Record, attach, record_of

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


@dataclass(frozen=True)
class Round:
    """The result of one round.

    Attributes:
        number: The round's number, from 1.
        step: The training step after which it took place.
        plan: The plan, for the model before this round.
        before: The model's cost before the round.
        after: The model's cost after the round.
        anew: Names of parameters whose optimizer state was dropped, because it could not be cut.
    """

    number: int
    step: int
    plan: Plan = field(repr=False)
    before: Cost
    after: Cost
    anew: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"round {self.number} after step {self.step}: {self.before.macs:,} to {self.after.macs:,} MACs, "
            f"{self.before.params:,} to {self.after.params:,} parameters"
        )


class GradualPruner:
    """Prunes a model in rounds while it is trained.

    In each round the current model is traced, scored on calibration data, pruned to the budget of the
    schedule and, if asked for, repaired. This is done on a copy, whose tensors the model then takes over. The
    model stays the same object with the same class, only its tensors are smaller. Each optimizer also stays
    the same object, and its moments lose the same positions. So training loops, learning-rate schedulers
    and DistributedDataParallel can continue with the objects that they hold.

    The model's record describes all rounds so far as one plan for the dense model. So `sc.save` and `sc.load`
    work as for any pruned model, and `shape_state` and `reshape` carry the shapes through checkpoints. The
    pruner itself holds no state that a resumed run needs.

    With several processes, every process must call `advance`. They share the work of scoring, and all
    apply the first process's plan.

    Args:
        schedule: When to prune, and how far.
        calibration: As for `sc.prune`. It must be the same full data in every process, not a part of it.
        allocator: As for `sc.prune`.
        repair: As for `sc.prune`. Default: None, because training continues anyway.
        limits: Limits on what may be removed.
        loss_fn: As for `sc.score`.
        forward: As for `sc.score`.
        allow_inexact: As for `sc.trace`.
        seed: Seed for all random choices.
        progress: Show progress bars on a terminal.

    Raises:
        SettingError: If a name is unknown.

    Example:
        >>> import secateur as sc
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> adam = torch.optim.Adam(net.parameters())
        >>> data = [(torch.randn(32, 4), torch.arange(32) % 2)]
        >>> pruner = GradualPruner(Schedule(sc.Budget(macs=0.5), start=0, end=4, rounds=2), data, "uniform")
        >>> for step in range(1, 6):
        ...     loss = nn.functional.cross_entropy(net(data[0][0]), data[0][1])
        ...     adam.zero_grad()
        ...     loss.backward()
        ...     adam.step()
        ...     done = pruner.advance(net, adam, step=step)
        ...     if done:
        ...         print(done)
        round 1 after step 2: 96 to 54 MACs, 114 to 65 parameters
        round 2 after step 4: 54 to 48 MACs, 65 to 58 parameters
    """

    def __init__(
        self,
        schedule: Schedule,
        calibration: Any,
        allocator: str | Allocates = "tod",
        *,
        repair: str | Sequence[str] | None = None,
        limits: Limits | None = None,
        loss_fn: LossFn | None = None,
        forward: Forward | None = None,
        allow_inexact: bool = False,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise SettingError(
                f"gradual pruning: expected a Schedule, got {type(schedule).__name__}. Make one."
            )
        resolve_repairs(repair)
        self.schedule = schedule
        self.calibration = Calibration.of(calibration, seed=seed, forward=forward)
        self.allocator = resolve(allocator)
        self.repair = repair
        self.limits = limits or Limits()
        self.loss_fn, self.allow_inexact, self.seed, self.progress = loss_fn, allow_inexact, seed, progress
        self.rounds: list[Round] = []
        """The rounds of this pruner, in order. Rounds before a resume are not in it."""

    def advance(
        self, model: nn.Module, optimizer: Optimizers = None, *, step: int, total: float | None = None
    ) -> Round | None:
        """Prune, if a round is due. Call this after each optimizer step; gradients are dropped.

        Args:
            model: The model, with or without its training wrapper. It becomes smaller in place.
            optimizer: The optimizer, or several, that hold its parameters. They continue with the smaller
                parameters.
            step: The number of steps taken so far.
            total: The number of all steps. Needed if the schedule's start or end is a fraction.

        Returns:
            The result of the round; None if no round is due.

        Raises:
            SettingError: If the model is sharded, or `total` is needed and missing.
            UnreachableBudgetError: If the budget of this round cannot be reached.
            SecateurError: Other errors of `sc.trace`, `sc.score` and `sc.apply`. The model is not changed.
        """
        schedule = self.schedule.over(total)
        number = schedule.due(step)
        inner = unwrap(model)
        if number <= rounds_of(inner):
            return None
        check_whole(model)
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else [*(optimizer or ())]
        before = pruned_record(inner)
        with own_forward(inner):
            small = self._smaller(inner, schedule, number, before)
            plan = record_of(small).plan
            named = dict(inner.named_parameters(remove_duplicate=False))
            replace_parameters(inner, small)
        moved = moves(named, dict(inner.named_parameters(remove_duplicate=False)), plan)
        anew = carry(optimizers, moved)
        attach(inner, _total_record(before, record_of(small), number))
        refresh(model)
        done = Round(number, step, plan, _cost(plan.dense), _cost(plan.predicted), anew)
        self.rounds.append(done)
        return done

    def _smaller(self, model: nn.Module, schedule: Schedule, number: int, before: Record | None) -> nn.Module:
        """Return a pruned copy of the model for this round. It is the same in all processes."""
        data = Calibration.of(self.calibration, model=model)
        example = data.first()
        inputs = example.inputs
        with team_of_processes(device_of(model)) as team:
            if team.size > 1:
                _agree(model)
            with team.together():
                graph = trace(model, inputs, allow_inexact=self.allow_inexact)
            dense = graph.cost() if before is None else _cost(before.plan.dense)
            target = schedule.target(number, dense)
            met = target.met(graph.cost(), graph.cost())
            scores = None if met else self._score(graph, data)
            limits = (
                self.limits
                if before is None
                else limits_ignoring(self.limits, split(graph.groups, before.plan))
            )

            def decide(limits: Limits | None) -> Plan:
                with team.together():
                    plan = self._plan(graph, scores, target, limits)
                return plan if team.size == 1 else Plan.from_json(team.from_first(plan.to_json()))

            applied = Applier(model, graph)

            def carry_out(plan: Plan) -> nn.Module:
                with team.together():
                    return applied(plan, example_inputs=inputs, on_unrealisable="leave")

            small = plan_until_expressible(
                decide,
                carry_out,
                limits,
                where=f"gradual pruning, round {number}",
                advice="Take a larger budget, or fewer rounds.",
            ).model
            if self.repair is not None and not met:
                with team.together():
                    small = repair_model(
                        small,
                        model,
                        data,
                        self.repair,
                        graph=graph,
                        loss_fn=self.loss_fn,
                        seed=self.seed,
                        progress=self.progress,
                    )
        return small

    def _score(self, graph: Graph, data: Calibration) -> Scores:
        return score(
            graph,
            data,
            self.allocator.signals,
            loss_fn=self.loss_fn,
            seed=self.seed,
            progress=self.progress,
        )

    def _plan(self, graph: Graph, scores: Scores | None, target: Budget, limits: Limits | None) -> Plan:
        if scores is None:  # the model is small enough already
            return Plan.build(graph, {}, allocator="none", seed=self.seed, budget=target.as_settings())
        rule = with_unit_curves(self.allocator, graph, self.calibration, scores, progress=self.progress)
        planned: Plan = rule.allocate(graph, scores, target, limits, self.seed)
        return planned


@torch.no_grad()
def _agree(model: nn.Module) -> None:
    """Copy the first process's tensors to all. Batch-norm statistics differ between them."""
    for tensor in named_tensors(model).values():
        sent = tensor.contiguous()
        dist.broadcast(sent, 0)
        if sent is not tensor:
            tensor.copy_(sent)


def _total_record(before: Record | None, now: Record, number: int) -> Record:
    """Join the record of this round with that of the rounds before, as one plan for the dense model."""
    record = now if before is None else compose(before, now)
    plan = record.plan.model_copy(
        update={"settings": dict(sorted({**record.plan.settings, ROUNDS: number}.items()))}
    )
    return replace(record, plan=plan)


def _cost(record: Any) -> Cost:
    return Cost(params=record.params, macs=record.macs)
