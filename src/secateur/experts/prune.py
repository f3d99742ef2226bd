"""The whole pipeline in one call, for experts: what `prune` does with ``granularity="expert"``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from secateur.allocate import Budget, Limits
from secateur.allocate.registry import describe
from secateur.apply.record import record_of, with_repairs
from secateur.auto.auto import Auto
from secateur.calibration import Calibration, Forward
from secateur.errors import SettingError
from secateur.evaluate import evaluate
from secateur.experts.allocate import allocate_experts, rule_called
from secateur.experts.apply import apply_experts, verify_experts
from secateur.experts.choose import choose_experts
from secateur.experts.repair import METHOD, repair_experts
from secateur.experts.score import score_experts
from secateur.experts.trace import trace_experts
from secateur.graph.graph import Graph
from secateur.models import unwrap
from secateur.report.collect import knob_of, layers_of
from secateur.report.data import versions
from secateur.report.report import Report
from secateur.result import Result, asked_for, clock, few, figures, proof_entry, scored_on, untouched
from secateur.score.combination import name_of
from secateur.score.loss import LossFn, loss_name

_REPAIRS = (None, "auto", METHOD, [METHOD], (METHOD,))


def prune_experts(
    model: nn.Module,
    calibration: Any,
    budget: Budget | None,
    allocator: Any,
    repair: str | Sequence[str] | None,
    *,
    limits: Limits | None,
    evaluation: Any,
    loss_fn: LossFn | None,
    forward: Forward | None,
    measure_latency: bool,
    seed: int,
    progress: bool,
) -> Result:
    """Trace, score, allocate, apply, verify and repair experts; arguments and result as of `prune`.

    Repair is ``"experts"``, which ``"auto"`` tries too: it is kept if the held-out loss is no worse for it.
    """
    decider = Auto() if allocator == Auto.name else allocator
    if not isinstance(decider, Auto):
        decider = rule_called(decider)
    if repair not in _REPAIRS:
        raise SettingError(
            f"prune(granularity='expert', repair={repair!r}): expected None, 'auto' or {METHOD!r}. Name one."
        )
    model = unwrap(model)
    data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
    fit, held = data.split()
    judged = (
        held if evaluation is None else Calibration.of(evaluation, seed=seed, forward=forward, model=model)
    )
    example = data.first()
    seconds: dict[str, float] = {}
    with clock(seconds, "trace"):
        graph = trace_experts(model, example.inputs)
    contest = None
    asked = budget
    if isinstance(decider, Auto):
        with clock(seconds, "choose"):
            choice = choose_experts(
                decider,
                model,
                graph,
                fit,
                held,
                budget,
                limits,
                repair=repair,
                loss_fn=loss_fn,
                seed=seed,
                progress=progress,
            )
        rule, scores, budget, contest = choice.rule, choice.scores, choice.budget, choice.contest
    else:
        rule = decider
        with clock(seconds, "score"):
            scores = score_experts(graph, fit, rule.signals, loss_fn=loss_fn, seed=seed, progress=progress)
    with clock(seconds, "allocate"):
        plan = allocate_experts(graph, scores, rule, budget, limits, seed)
    with clock(seconds, "apply"):
        small = apply_experts(model, plan, graph=graph)
    with clock(seconds, "verify"):
        proof = verify_experts(model, small, plan, few(example, None), graph=graph)

    def measured(which: nn.Module, stage: str, on: Calibration) -> Any:
        return evaluate(
            which, on, dense=model, loss_fn=loss_fn, progress=progress, description=f"Measuring {stage}"
        )

    repaired = small
    with clock(seconds, "repair"):
        if repair is not None:
            repaired = repair_experts(small, model, fit, graph=graph, seed=seed, progress=progress)
            tried = record_of(repaired).repairs[-1]
            before, after = (
                measured(m, s, held).loss for m, s in ((small, "pruned"), (repaired, "repaired"))
            )
            tried["kept"] = tried["kept"] and after <= before
            if not tried["kept"]:
                repaired = with_repairs(small, [tried])
    kept = any(r["kept"] for r in record_of(repaired).repairs)
    stages = [("dense", model), ("pruned", small), *([("repaired", repaired)] if kept else [])]
    with clock(seconds, "measure"):
        found = [measured(m, stage, judged) for stage, m in stages]
        measures = figures(stages, found, plan, example, measure_latency=measure_latency)
    report = Report(
        model=type(model).__name__,
        asked=asked_for(
            asked,
            Auto.name if contest else plan.allocator,
            "expert",
            repair,
            "module",
            seed,
            loss=loss_name(loss_fn, example),
        ),
        rule=plan.allocator,
        settings=plan.settings,
        figures=measures,
        judged_on="held-out calibration data" if evaluation is None else "evaluation data",
        calibration=scored_on(scores),
        layers=layers_of(plan, scores.only(map(name_of, rule.signals))),
        knob=knob_of(plan),
        untouched=untouched(cast(Graph, graph)),
        form="module",
        note="",
        takes=record_of(small).takes,
        attributes=dict(record_of(small).sizes),
        proof=proof_entry(proof),
        repairs=record_of(repaired).repairs,
        certificates=plan.certificates,
        description=describe(plan.allocator, plan.certificates, rule),
        contest=contest,
        seconds=seconds,
        versions=versions(),
    )
    return Result(repaired, plan, scores, cast(Graph, graph), report)
