"""The whole pipeline for single weights: score, allocate, mask, check, repair, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.allocate import Budget, Limits
from secateur.allocate.registry import Allocates, describe
from secateur.apply.record import record_of
from secateur.auto.auto import Auto, rule_or_auto
from secateur.calibration import Calibration, Forward
from secateur.cost import weight_bytes
from secateur.evaluate import evaluate
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.masks.allocate import allocate
from secateur.masks.apply import apply, check
from secateur.masks.choose import choose_weights
from secateur.masks.distortion import with_curves
from secateur.masks.plan import MaskPlan
from secateur.masks.score import asked_of, score
from secateur.masks.surgeon import surgeon
from secateur.masks.weights import Weights
from secateur.models import unwrap
from secateur.repair.methods import Repair, Work
from secateur.repair.methods import resolve as resolve_repairs
from secateur.repair.repair import repair as repair_model
from secateur.report.collect import histograms
from secateur.report.data import Figures, Layer, versions
from secateur.report.report import Report
from secateur.result import asked_for, clock, scored_on
from secateur.score.loss import LossFn, loss_name
from secateur.score.scores import Scores


@dataclass(frozen=True, eq=False)
class MaskResult:
    """What `prune` returns.

    Attributes:
        model: A new model, of the dense one's shapes, with weights at zero.
        plan: The masks; ``plan.save(path)`` keeps them.
        scores: What each weight was worth.
        graph: The trace.
        report: What happened.
    """

    model: nn.Module
    plan: MaskPlan
    scores: Scores
    graph: Graph
    report: Report


def prune(
    model: nn.Module,
    calibration: Any,
    budget: Budget | None = None,
    allocator: str | Allocates | Auto = "emp",
    repair: str | Sequence[str] | None = "auto",
    *,
    limits: Limits | None = None,
    evaluation: Any = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MaskResult:
    """Score, allocate, mask, check and repair. Of the calibration data a fifth is held out, as in `sc.prune`.

    Args:
        model: Any module that `torch.export` can capture; it is left as it was.
        calibration: As for `sc.prune`.
        budget: ``Budget(sparsity=0.9)``; None lets the rule decide.
        allocator: A name or an instance, ``Uniform(removal="wanda")`` for one; `Repairability` without curves
            has them measured. ``"auto"`` lets rules compete, as for `sc.prune`.
        repair: As for `sc.repair`, and ``surgeon``: the second-order update of linear layers, from the dense
            weights on, so the first where there are several. What is zero stays zero.
        limits: What must stay.
        evaluation: Data that the report's accuracy is measured on; the held-out part if not given.
        loss_fn: As for `sc.score`.
        forward: As for `sc.score`.
        seed: Of everything that draws.
        progress: Show bars on a terminal.

    Raises:
        SecateurError: One of its kinds; see each step.
    """
    decider = rule_or_auto(allocator)
    wanted = () if isinstance(decider, Auto) else asked_of(decider)
    model = unwrap(model)

    def own(plan: MaskPlan) -> dict[str, Repair]:
        def second_order(candidate: nn.Module, work: Work) -> dict[str, Any] | None:
            names = surgeon(candidate, model, plan, work.data, progress=work.progress)
            return {"updated": list(names)} if names else None

        return {"surgeon": Repair("surgeon", second_order)}

    # A wrong name is refused now, not after scoring.
    resolve_repairs(repair, {"surgeon": Repair("surgeon", lambda small, work: None)})
    data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
    fit, held = data.split()
    seconds: dict[str, float] = {}
    example = data.first()
    with clock(seconds, "trace"):
        graph = trace(model, example.inputs, allow_inexact=True)
    contest = None
    asked = budget
    if isinstance(decider, Auto):
        with clock(seconds, "choose"):
            choice = choose_weights(
                decider,
                model,
                graph,
                fit,
                held,
                budget,
                limits,
                repair=repair,
                own=own,
                loss_fn=loss_fn,
                seed=seed,
                progress=progress,
            )
        rule, scores, budget, contest = choice.rule, choice.scores, choice.budget, choice.contest
    else:
        with clock(seconds, "score"):
            scores = score(model, fit, wanted, loss_fn=loss_fn, seed=seed, progress=progress)
        rule = decider
    with clock(seconds, "allocate"):
        rule = with_curves(rule, model, fit, scores, progress=progress)
        plan = allocate(Weights.of(model), scores, rule, budget, limits, seed)
    with clock(seconds, "apply"):
        small = apply(model, plan, graph)
    with clock(seconds, "verify"):
        check(model, small, plan)
    with clock(seconds, "repair"):
        repaired = repair_model(
            small,
            model,
            data,
            repair,
            own=own(plan),
            graph=graph,
            loss_fn=loss_fn,
            seed=seed,
            progress=progress,
        )
    stages = [("dense", model), ("pruned", small)]
    if any(entry["kept"] for entry in record_of(repaired).repairs):
        stages.append(("repaired", repaired))
    judged = (
        held if evaluation is None else Calibration.of(evaluation, seed=seed, forward=forward, model=model)
    )
    with clock(seconds, "measure"):
        figures = tuple(_figures(stage, m, model, judged, loss_fn, graph, plan) for stage, m in stages)
    decisive = scores.only(asked_of(rule))
    report = Report(
        model=type(model).__name__,
        asked=asked_for(
            asked,
            Auto.name if contest else plan.allocator,
            "weight",
            repair,
            "masked",
            seed,
            loss=loss_name(loss_fn, example),
        ),
        rule=plan.allocator,
        settings=dict(plan.settings),
        figures=figures,
        judged_on="held-out calibration data" if evaluation is None else "evaluation data",
        calibration=scored_on(scores),
        layers=tuple(
            Layer(
                group=name,
                kept=int(mask.sum()),
                total=mask.size,
                producers=(name,),
                scores=histograms(decisive, name, mask),
            )
            for name, mask in plan.masks.items()
        ),
        untouched=(),
        form="masked",
        note=record_of(small).note,
        takes=record_of(small).takes,
        proof={
            "difference": 0.0,
            "tolerance": 0.0,
            "reference": "masks",
            "outputs": len(model.state_dict()),
        },
        repairs=record_of(repaired).repairs,
        certificates=dict(plan.certificates),
        description=describe(plan.allocator, plan.certificates, rule),
        contest=contest,
        seconds=seconds,
        versions=versions(),
    )
    return MaskResult(repaired, plan, scores, graph, report)


def _figures(
    stage: str,
    model: nn.Module,
    dense: nn.Module,
    data: Calibration,
    loss_fn: LossFn | None,
    graph: Graph,
    plan: MaskPlan,
) -> Figures:
    found, cost = evaluate(model, data, dense=dense, loss_fn=loss_fn), graph.cost()
    gone = 0 if stage == "dense" else plan.removed
    return Figures(
        stage=stage,
        params=cost.params - gone,
        macs=cost.macs,  # zeros are multiplied like any other number
        weight_bytes=weight_bytes(model),
        loss=found.loss,
        measure=found.measure,
        accuracy=found.accuracy,
        samples=found.samples,
    )
