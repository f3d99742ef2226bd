"""Rounds of pruning while a model is trained, by whatever loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from secateur.allocate import Budget, Limits, resolve
from secateur.allocate.registry import Allocates
from secateur.allocate.unit_distortions import with_unit_curves
from secateur.apply.apply import apply
from secateur.apply.composing import compose, split
from secateur.apply.record import Record, attach, record_of
from secateur.calibration import Calibration, Forward
from secateur.compat.training import own_forward
from secateur.cost import Cost
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.integrations.optimizers import carry, moves
from secateur.integrations.replacing import replace_parameters
from secateur.integrations.schedule import Schedule
from secateur.integrations.shapes import ROUNDS, pruned_record, rounds_of
from secateur.integrations.wrappers import check_whole, refresh
from secateur.models import device_of, named_tensors, unwrap
from secateur.plan import Plan
from secateur.repair.methods import resolve as resolve_repairs
from secateur.repair.repair import repair as repair_model
from secateur.score import Scores, score
from secateur.score.distributed import joined
from secateur.score.loss import LossFn
from secateur.settling import settle, without

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: From 1.
        step: After which training step.
        plan: The decision, about the model as it was before this round.
        before: What that cost.
        after: What the model costs now.
        anew: Parameters whose optimizer state could not be carried over.
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

    At each round the model, as training has made it, is traced, scored on calibration data, allocated to what
    the schedule leaves, pruned and, if asked for, repaired: once for all on a copy, which the model then
    becomes. It stays the same object, of the same class, with smaller tensors, and so does each optimizer,
    whose moments lose the same positions. So training loops, learning-rate schedulers and
    DistributedDataParallel go on with what they hold.

    What was done so far is with the model, as one plan for the dense one: `sc.save` and `sc.load` take it as
    any pruned model, and `shape_state` and `reshape` carry it through checkpoints. The pruner itself keeps
    nothing that a resumed run would miss.

    Of several processes all call `advance` alike; they share the scoring, and carry out the first one's
    decision.

    Args:
        schedule: When, and how far.
        calibration: As for `sc.prune`; plain data, the same in every process, not a share of it.
        allocator: As for `sc.prune`.
        repair: As for `sc.prune`, but None by default: training goes on anyway.
        limits: What must stay.
        loss_fn: As for `sc.score`.
        forward: As for `sc.score`.
        allow_inexact: As for `sc.trace`.
        seed: Seed for all random choices.
        progress: Show bars on a terminal.

    Raises:
        SettingError: A name is unknown.

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
        """What this pruner has done, in order; not what a run did before it was resumed."""

    def advance(
        self, model: nn.Module, optimizer: Optimizers = None, *, step: int, total: float | None = None
    ) -> Round | None:
        """Prune, if a round is due. Call it after each optimizer step, with gradients used up.

        Args:
            model: The model, in whatever wrapper training calls it by; it becomes smaller in place.
            optimizer: One or several that hold its parameters; they go on with the smaller ones. Gradients
                are gone.
            step: How many steps have been taken.
            total: How many there will be, for a schedule in shares.

        Returns:
            What was done; None where no round is due.

        Raises:
            SettingError: The model is sharded, or a schedule in shares has no total.
            UnreachableBudgetError: What the schedule leaves cannot be reached.
            SecateurError: One of its kinds; see `sc.trace`, `sc.score` and `sc.apply`. The model is as it
                was.
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
        attach(inner, _so_far(before, record_of(small), number))
        refresh(model)
        done = Round(number, step, plan, _cost(plan.dense), _cost(plan.predicted), anew)
        self.rounds.append(done)
        return done

    def _smaller(self, model: nn.Module, schedule: Schedule, number: int, before: Record | None) -> nn.Module:
        """A copy of the model after this round, alike in all processes."""
        data = Calibration.of(self.calibration, model=model)
        example = data.first()
        inputs = example.inputs
        with joined(device_of(model)) as team:
            if team.size > 1:
                _agree(model)
            with team.together():
                graph = trace(model, inputs, allow_inexact=self.allow_inexact)
            dense = graph.cost() if before is None else _cost(before.plan.dense)
            target = schedule.target(number, dense)
            met = target.met(graph.cost(), graph.cost())
            scores = None if met else self._score(graph, data)
            limits = self.limits if before is None else without(self.limits, split(graph.groups, before.plan))

            def decide(limits: Limits | None) -> Plan:
                with team.together():
                    plan = self._plan(graph, scores, target, limits)
                return plan if team.size == 1 else Plan.from_json(team.from_first(plan.to_json()))

            def carry_out(plan: Plan) -> nn.Module:
                with team.together():
                    return apply(model, plan, graph=graph, example_inputs=inputs, on_unrealisable="leave")

            small = settle(
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
    """Give every process the first one's tensors: each has counted batch-norm statistics on its own share."""
    for tensor in named_tensors(model).values():
        sent = tensor.contiguous()
        dist.broadcast(sent, 0)
        if sent is not tensor:
            tensor.copy_(sent)


def _so_far(before: Record | None, now: Record, number: int) -> Record:
    record = now if before is None else compose(before, now)
    plan = record.plan.model_copy(
        update={"settings": dict(sorted({**record.plan.settings, ROUNDS: number}.items()))}
    )
    return replace(record, plan=plan)


def _cost(record: Any) -> Cost:
    return Cost(params=record.params, macs=record.macs)
