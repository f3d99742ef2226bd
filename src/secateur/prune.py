"""The whole pipeline in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from secateur.allocate import Budget, Limits
from secateur.allocate.registry import Allocates, describe
from secateur.allocate.unit_distortions import with_unit_curves
from secateur.apply.apply import FORMS, apply
from secateur.apply.record import record_of, with_note
from secateur.auto import Auto, Choice, choose
from secateur.auto.auto import rule_or_auto
from secateur.auto.scored import scored
from secateur.calibration import Calibration, Forward
from secateur.errors import SettingError
from secateur.evaluate import evaluate
from secateur.experts.prune import prune_experts
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.latency.budget import meet_latency_budget
from secateur.masks.prune import MaskResult
from secateur.masks.prune import prune as prune_weights
from secateur.models import unwrap
from secateur.modes import require_plain_modes
from secateur.plan import Plan
from secateur.repair.methods import resolve as resolve_repairs
from secateur.repair.repair import repair as repair_model
from secateur.report.collect import knob_of, layers_of
from secateur.report.data import versions
from secateur.report.report import Report
from secateur.result import (
    Result,
    asked_for,
    check_labels,
    clock,
    few,
    figures,
    proof_entry,
    scored_on,
    untouched,
)
from secateur.score import score
from secateur.score.combination import name_of
from secateur.score.distributed import joined
from secateur.score.loss import LossFn, loss_name
from secateur.settling import settle
from secateur.steps import budget_after, plan_in_steps
from secateur.verify import verify


def prune(
    model: nn.Module,
    calibration: Any,
    budget: Budget | None = None,
    allocator: str | Allocates | Auto | None = None,
    granularity: Literal["unit", "weight", "expert"] = "unit",
    repair: str | Sequence[str] | None = "auto",
    *,
    limits: Limits | None = None,
    steps: int = 1,
    form: Literal["auto", "module", "graph", "masked"] = "auto",
    on_unrealisable: Literal["graph", "leave"] = "leave",
    evaluation: Any = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    allow_inexact: bool = False,
    measure_latency: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Result | MaskResult:
    """Trace, score, allocate, apply, verify and repair.

    Args:
        model: Any module that `torch.export` can capture; it is left as it was.
        calibration: A DataLoader, Dataset or iterable of batches. A fifth of it is held out to choose
            and judge repairs; scores and repairs see the rest.
        budget: What the result may cost; None lets the rule decide.
        allocator: A name or an instance: ``"tod"``, ``sc.ToD(tolerance=0.05)``, ``sc.Uniform(ratio=0.3)``.
            ``"auto"``: rules compete on held-out data (`sc.Auto`), which is what None stands for; for single
            weights it stands for ``"emp"``, for experts for ``"tod"``.
        granularity: What is removed. ``"unit"``: channels, neurons, heads, hidden units. ``"weight"``: single
            weights, which become zero. ``"expert"``: experts of a mixture-of-experts model, which need not
            be captured.
        repair: None, a name, a list of names, or ``"auto"``.
        limits: What must stay: multiples, minimum, groups to leave alone.
        steps: Rounds in which units are removed, the model repaired and scored anew, each of which takes the
            same fraction of what is left; needs a budget of macs or params.
        form: As for `apply`.
        on_unrealisable: What happens to groups that no module can express: ``leave`` keeps them whole and
            spends the budget on the others; ``graph`` returns a captured program. The note names them.
        evaluation: Data that the report's accuracy is measured on; the held-out part if not given.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of a batch, instead of the default.
        forward: ``forward(model, batch)`` calls the model on what the loader gives:
            ``lambda model, batch: model(batch["image"])``. Needed where batches are neither tensors, nor
            ``(inputs, labels)``, nor mappings whose keys are arguments.
        allow_inexact: As for `trace`.
        measure_latency: Time the models on this machine (a few dozen forward passes).
        seed: Of everything that draws. Same inputs and seed, same plan.
        progress: Show bars on a terminal.

    Returns:
        The model, the plan, the scores, the graph and the report; for single weights a `MaskResult`, which
        has the same.

    Raises:
        SecateurError: One of its kinds; see each step.
    """
    if type(steps) is not int or steps < 1 or (steps > 1 and (budget is None or granularity != "unit")):
        raise SettingError(
            f"prune(steps={steps!r}): expected a number of rounds of at least 1, and for several a budget "
            "and granularity 'unit'. Do give these, or leave steps out."
        )
    if isinstance(limits, Limits):  # modules are found in this model, not in those of later rounds
        limits = limits.named(dict(unwrap(model).named_parameters(remove_duplicate=False)))
    if granularity == "expert":
        if form not in ("auto", "module"):
            raise SettingError(f"prune(form={form!r}): expected 'auto' or 'module' for experts.")
        return prune_experts(
            model,
            calibration,
            budget,
            allocator or "tod",
            repair,
            limits=limits,
            evaluation=evaluation,
            loss_fn=loss_fn,
            forward=forward,
            measure_latency=measure_latency,
            seed=seed,
            progress=progress,
        )
    if granularity == "weight":
        if form not in ("auto", "masked"):
            raise SettingError(f"prune(form={form!r}): expected 'auto' or 'masked' for single weights.")
        return prune_weights(
            model,
            calibration,
            budget,
            allocator or "emp",
            repair,
            limits=limits,
            evaluation=evaluation,
            loss_fn=loss_fn,
            forward=forward,
            seed=seed,
            progress=progress,
        )
    if granularity != "unit":
        raise SettingError(f"prune(granularity={granularity!r}): expected 'unit', 'weight' or 'expert'.")
    if form not in FORMS:
        raise SettingError(f"prune(form={form!r}): expected one of {', '.join(FORMS)}.")
    if on_unrealisable not in ("graph", "leave"):
        raise SettingError(f"prune(on_unrealisable={on_unrealisable!r}): expected 'graph' or 'leave'.")
    decider = rule_or_auto(allocator)
    resolve_repairs(repair)  # a wrong name is refused now, not after scoring
    model = unwrap(model)
    require_plain_modes("prune", model)
    data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
    fit, held = data.split()
    seconds: dict[str, float] = {}
    example = data.first()
    inputs = example.inputs
    if evaluation is None:
        check_labels(model, example, loss_fn)
    with clock(seconds, "trace"):
        graph = trace(model, inputs, allow_inexact=allow_inexact)
    choice: Choice | None = None
    asked = budget
    if isinstance(decider, Auto):
        with clock(seconds, "score"):
            known = scored(decider, graph, fit, loss_fn=loss_fn, seed=seed, progress=progress)
        with clock(seconds, "choose"):
            choice = choose(
                decider,
                model,
                graph,
                fit,
                held,
                budget,
                limits,
                repair=repair,
                known=known,
                loss_fn=loss_fn,
                seed=seed,
                progress=progress,
            )
        curved, scores, budget = choice.rule, choice.scores, choice.budget
    else:
        with clock(seconds, "score"):
            scores = score(graph, fit, decider.signals, loss_fn=loss_fn, seed=seed, progress=progress)
        with clock(seconds, "curves"):
            curved = with_unit_curves(decider, graph, fit, scores, progress=progress)

    noted: list[str] = []  # what rounds say of groups that they left whole

    def decide(limits: Limits | None) -> Plan:
        def allocate(asked: Budget | None, limits: Limits | None = limits) -> Plan:
            planned: Plan = curved.allocate(graph, scores, asked, limits, seed)
            return planned

        if steps > 1 and budget is not None:
            planned, note = plan_in_steps(
                model,
                graph,
                fit,
                curved,
                partial(allocate, budget_after(1, steps, budget, graph)),
                budget,
                steps,
                limits,
                on_unrealisable=on_unrealisable,
                repair=repair,
                allow_inexact=allow_inexact,
                loss_fn=loss_fn,
                seed=seed,
                progress=progress,
            )
            noted.append(note)
            return planned
        if isinstance(budget, Budget) and budget.latency is not None:
            return meet_latency_budget(model, graph, budget, allocate, inputs, form)
        return allocate(budget)

    def agreed(limits: Limits | None) -> Plan:
        with clock(seconds, "allocate"):
            return _agreed(graph, partial(decide, limits))

    example_inputs = few(example, graph.static_batch)

    def carry_out(plan: Plan) -> nn.Module:
        with clock(seconds, "apply"):
            return apply(
                model,
                plan,
                form,
                graph=graph,
                example_inputs=example_inputs,
                on_unrealisable=on_unrealisable,
            )

    small = settle(agreed, carry_out, limits)
    if noted and noted[-1] not in record_of(small).note:
        with_note(small, noted[-1])
    plan = record_of(small).plan
    with clock(seconds, "verify"):
        proof = verify(model, small, plan, example_inputs)
        note = record_of(small).note  # without the doubts, which the report's proof has
        if not proof.proven:
            with_note(small, f"not proven: {'; '.join(proof.doubts)}.")
    with clock(seconds, "repair"):
        repaired = repair_model(
            small, model, data, repair, graph=graph, loss_fn=loss_fn, seed=seed, progress=progress
        )
    judged = (
        held if evaluation is None else Calibration.of(evaluation, seed=seed, forward=forward, model=model)
    )
    kept_any = any(r["kept"] for r in record_of(repaired).repairs)
    stages = [("dense", model), ("pruned", small)] + ([("repaired", repaired)] if kept_any else [])
    with clock(seconds, "measure"):
        measured = [
            evaluate(
                m, judged, dense=model, loss_fn=loss_fn, progress=progress, description=f"Measuring {stage}"
            )
            for stage, m in stages
        ]
        measures = figures(stages, measured, plan, example, measure_latency=measure_latency)
    report = Report(
        model=type(model).__name__,
        asked=asked_for(
            asked,
            Auto.name if choice else plan.allocator,
            granularity,
            repair,
            form,
            seed,
            loss=loss_name(loss_fn, example),
            allow_inexact=allow_inexact,
            **({"steps": steps} if steps > 1 else {}),
            **({} if on_unrealisable == "leave" else {"on_unrealisable": on_unrealisable}),
        ),
        rule=plan.allocator,
        settings=plan.settings,
        figures=measures,
        judged_on="held-out calibration data" if evaluation is None else "evaluation data",
        calibration=scored_on(scores),
        layers=layers_of(plan, scores.only(map(name_of, curved.signals))),
        knob=knob_of(plan),
        untouched=untouched(graph),
        form=record_of(small).form,
        note=note,
        takes=record_of(repaired).takes,
        attributes=dict(record_of(small).sizes),
        proof=proof_entry(proof),
        repairs=record_of(repaired).repairs,
        certificates=plan.certificates,
        description=describe(plan.allocator, plan.certificates, curved),
        contest=None if choice is None else choice.contest,
        seconds=seconds,
        versions=versions(graph.device),
    )
    return Result(repaired, plan, scores, graph, report)


def _agreed(graph: Graph, allocate: Callable[[], Plan]) -> Plan:
    """The plan; where several processes work together (see `score`), the first one's for all."""
    with joined(graph.device) as team:
        with team.together():
            plan = allocate()
        return plan if team.size == 1 else Plan.from_json(team.from_first(plan.to_json()))
