"""The whole pipeline in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

from torch import nn

from secateur.allocators import Budget, Limits
from secateur.allocators.registry import Allocates, describe
from secateur.calibration import Calibration, Forward, View, Views
from secateur.calibration.workers import living_workers
from secateur.common.caches import without_caches
from secateur.common.models import device_of, unwrap
from secateur.common.modes import require_plain_modes, require_values
from secateur.common.precision import full_precision
from secateur.common.seeds import seed_of
from secateur.config.names import Granularity, Quantisation
from secateur.measure.evaluate import evaluate
from secateur.measure.quality import Gauge, Metric
from secateur.pipeline.auto.choose import checked
from secateur.pipeline.auto.chooser import Choice, Chooser
from secateur.pipeline.auto.choosers import chooser_of
from secateur.pipeline.bounds.frontier import Frontier
from secateur.pipeline.bounds.meet import HeldOut, candidates_budget, frontier_at, meet
from secateur.pipeline.bounds.plans import Plans
from secateur.pipeline.bounds.quality import require_enough
from secateur.pipeline.options import check_quality, checked_target_class
from secateur.pipeline.quantise import Quantised, Quantiser
from secateur.pipeline.result import (
    Result,
    check_labels,
    clock,
    figures,
    proof_entry,
    report_settings,
    scored_on,
)
from secateur.pipeline.rounding import finest, is_measured, require_units, rounded
from secateur.pipeline.targets.target import Form, Scored, Target, Task
from secateur.proof.verify import Proof
from secateur.repairs.methods import Methods
from secateur.report.data import versions
from secateur.report.report import Report
from secateur.signals import Scores
from secateur.signals.code import code_digest
from secateur.signals.distributed import team_of_processes
from secateur.signals.identity import of_data, of_run
from secateur.signals.journal import journal_in, text_digest
from secateur.signals.loss import LossFn, loss_name
from secateur.targets.granularity import named
from secateur.targets.units.record import record_of, with_note
from secateur.targets.units.spread import gathered


@living_workers()
@full_precision()
def prune(
    model: nn.Module,
    calibration: Any,
    budget: Budget | None = None,
    allocator: str | Allocates | Chooser | None = None,
    granularity: Granularity | Sequence[Granularity] = "unit",
    repair: Methods = "auto",
    *,
    limits: Limits | None = None,
    steps: int = 1,
    form: Form = "auto",
    on_unrealisable: Literal["graph", "leave"] = "leave",
    evaluation: Any = None,
    held_out: Any = None,
    metric: Metric | None = None,
    frontier: Sequence[float] | None = None,
    quantise: Quantisation | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    views: int | Views | View | None = None,
    allow_inexact: bool = False,
    measure_latency: bool | None = None,
    checkpoint: str | PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Trace, score, allocate, apply, verify and repair.

    Args:
        model: Any module that `torch.export` can capture. It is not changed.
        calibration: A DataLoader, Dataset or iterable of batches. A fifth of it is held out to choose
            and judge repairs; scores and repairs see the rest.
        budget: What the result may cost, or lose; None lets the rule decide.
        allocator: A name or an instance: ``"tod"``, ``sc.ToD(tolerance=0.05)``, ``sc.Uniform(ratio=0.3)``.
            ``"auto"``: rules compete on held-out data (`sc.Auto`), which is what None stands for; for single
            weights it stands for ``"emp"``, for experts for ``"tod"``. ``"search"``: for units, budget is
            moved between groups as measured models tell (`sc.Search`).
        granularity: What is removed. ``"unit"``: channels, neurons, heads, hidden units. ``"weight"``: single
            weights, which become zero. ``"expert"``: experts of a mixture-of-experts model, which need not
            be captured. ``"block"``: residual blocks, dropped whole. ``"head_size"``: dimensions of attention
            heads; ``["unit", "head_size"]``: these and all units but whole heads. ``["unit", "expert"]``:
            both under one budget; one knob decides on all groups. ``["unit", "block"]``, ``["unit",
            "head_size", "block"]``: blocks have a share of what one budget saves, and units save the rest.
            ``"rank"``: directions of linear layers, which become two layers each; ``["unit", "rank"]``: these
            and all units, in one allocation.
        repair: None, a name, a list of names, or ``"auto"``. For single weights also ``"surgeon"``: the
            second-order update of linear layers, from the dense weights on, so it comes first where there are
            several. For experts ``"experts"``, which ``"auto"`` stands for, and ``"merge"`` before it or
            alone: kept if the held-out loss is no worse for it.
        limits: What must stay: multiples, minimum, groups to leave alone.
        steps: Rounds in which units, experts or blocks are removed, the model repaired and scored anew, each
            of which takes the same fraction of what is left; needs a budget of macs, params or experts.
        form: As for `apply`.
        on_unrealisable: What happens to groups that no module can express: ``leave`` keeps them whole and
            spends the budget on the others; ``graph`` returns a captured program. The note names them.
        evaluation: Data that the report's accuracy is measured on; the held-out part if not given.
        held_out: Data that bounds on quality are decided on, and the frontier is measured on; half of
            `calibration` if not given. Nothing else reads them. They should be new to the model too: pruning
            may damage what it was trained on more, or less.
        metric: ``metric(model, batch)``: a tensor of one number a sample [samples], higher is better, in
            place of the accuracy; or a tuple of two, numerators and counts, whose sums are divided. `batch`
            is what the loader gives, on the model's device.
        frontier: Also repair and measure the plans that keep these shares of the cost, from the same scoring:
            ``(0.9, 0.8, 0.7)``. `Result.frontier` and the report have them.
        quantise: ``"int8"`` or ``"int4"``: after repair, also make an ONNX file with so few bits, calibrated
            with the data that scores read. `Result.quantised` has it, and the report its size, time and
            quality beside the dense and the pruned model's, all run by ONNX Runtime; see `sc.quantise`.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of a batch, instead of the default.
        forward: ``forward(model, batch)`` calls the model on what the loader gives:
            ``lambda model, batch: model(batch["image"])``. Needed where batches are neither tensors, nor
            ``(inputs, labels)``, nor mappings whose keys are arguments.
        views: In how many views each sample serves for scores and repairs, itself included: a number for
            crops and mirror images of pictures, or `Views`, or your own ``view(inputs, k, generator)``. What
            is held out is measured as it is. None: as `calibration` says, or one.
        allow_inexact: As for `trace`.
        measure_latency: Time the models on this machine: 46 forward passes, or as many as take about 20
            seconds, but at least 12. None: unless single weights are removed, which changes no time.
        checkpoint: A folder that keeps what is finished: scores, judged candidates, refitted layers, repairs.
            If the run is killed, at any time, the same call goes on where it was and gives the same model,
            bit for bit. Delete the folder when the result is saved. It holds the tensors that repairs
            changed, for each repair that was tried. Started again are: tracing, the curves that rules measure
            themselves, the proof and measuring; a pass that scores experts, blocks or single weights; the
            refit of experts; a pass of `Polish`; repairs of your own. What is bounded in time or decided by
            measured time may end differently.
        seed: Seed for all random choices. Same inputs and seed, same plan.
        progress: Show bars on a terminal.

    Returns:
        The model, the plan (for single weights a `MaskPlan`), the scores, the graph and the report.

    Raises:
        SettingError: A setting is wrong, or means nothing for this granularity.
        ArtefactError: The checkpoint is damaged, or of another model, data or settings.
        SecateurError: One of its kinds; see each step.
    """
    what = named("prune", granularity)
    if budget is not None:
        checked("prune", budget)
    kind = checked_target_class(what, form, budget, steps, allow_inexact, on_unrealisable, measure_latency)
    check_quality(budget, held_out, metric, frontier)
    decider: Any = kind.default if allocator is None else allocator
    chooser = chooser_of(decider)
    if chooser is None:
        decider = kind.rule(decider)
    else:
        chooser.check("prune", what)
    seed = seed_of(seed)
    kind.check_repair(repair)  # a wrong name is refused now, not after scoring
    model = unwrap(model)
    if what != "weight":  # whose layers are read through the hooks
        model = gathered(model)
    require_plain_modes("prune", model)
    require_values("prune", model)
    if isinstance(limits, Limits):  # modules are found in this model, not in those of later rounds
        limits = limits.named(dict(model.named_parameters(remove_duplicate=False)))
        require_units(limits, what)

    def read(given: Any, views: int | Views | View | None = None) -> Calibration:
        return Calibration.of(given, seed=seed, forward=forward, model=model, views=views)

    with team_of_processes(device_of(model)) as team, ExitStack() as stack:
        with team.together():
            data, held = read(calibration, views), None
            if frontier is not None or (budget is not None and budget.quality):
                data, judge = data.split(2) if held_out is None else (data, read(held_out))
                held = HeldOut(
                    Gauge(model, judge, metric, loss_fn), lambda other: Gauge(model, other, metric, loss_fn)
                )
            task = Task(
                model,
                data,
                finest(limits),
                repair,
                form,
                on_unrealisable,
                allow_inexact,
                steps,
                loss_fn,
                metric,
                seed,
                progress,
            )
            stack.enter_context(without_caches(model, lambda: task.example.arguments))
            if evaluation is None:
                check_labels(model, task.example, loss_fn)
            quantiser = None if quantise is None else Quantiser.of(model, task.example, quantise, team.size)
        settings = {
            "budget": budget,
            "allocator": decider,
            "repair": repair,
            "limits": limits,
            "granularity": what,
            "form": form,
            "on_unrealisable": on_unrealisable,
            "allow_inexact": allow_inexact,
            "steps": steps,
            "seed": seed,
            "views": views,
            "frontier": frontier,
        }
        team.agree("prune", model, task.data, **settings)
        own = {"loss_fn": loss_fn, "metric": metric, "forward": forward, "held_out": held_out is not None}

        def about() -> dict[str, str]:
            code = {"code of the model or of functions": code_digest(model, loss_fn, metric, forward)}
            values = {"values of the data": text_digest(of_data(task.data))}
            if held is not None:
                values["values of the held-out data"] = text_digest(of_data(held.gauge.data))
            found = of_run(model, task.data, **settings, **own, processes=team.size)
            return found | values | code

        stack.enter_context(journal_in(checkpoint, about))
        if held is not None and budget is not None:
            with team.together():
                for bound in budget.quality:
                    held.gauge.check(bound)
            require_enough(held.gauge, budget, counted=metric is None)
        target = kind(task)
        choice, asked = None, budget
        if chooser is not None:
            with clock(task.seconds, "score"):
                known = target.score_candidates(chooser.candidates_for(target).values())
            with clock(task.seconds, "choose"):
                rules = chooser.candidates_for(target).values()
                shared_budget = (
                    None if budget is None else candidates_budget(target, budget, known, rules, held)
                )
                choice = chooser.choose(target, shared_budget, known)
            rule, scores, budget = choice.rule, choice.scores, budget or choice.budget
        else:
            with clock(task.seconds, "score"):
                scores = target.score([decider])
            with clock(task.seconds, "curves"):
                rule = target.with_measurements(decider, task.fit, scores)
        described = report_settings(
            asked,
            chooser.name if chooser else "",  # that of the plan: a rule of the user's own has no name
            what,
            repair,
            form,
            seed,
            loss=loss_name(loss_fn, task.example),
            **({} if "allow_inexact" in kind.refused else {"allow_inexact": allow_inexact}),
            **({"steps": steps} if steps > 1 else {}),
            **({"quantise": quantise} if quantise else {}),
            **({"views": task.data.repeats} if task.data.repeats > 1 else {}),
            **({} if on_unrealisable == "leave" else {"on_unrealisable": on_unrealisable}),
        )
        rounding = ""
        if is_measured(limits):
            with clock(task.seconds, "round"):
                counted = budget and candidates_budget(target, budget, Scored(scores), [rule], held)
                limits, rounding = rounded(limits, target, rule, scores, counted, budget)
            target = type(target)(replace(target.task, limits=limits), target.graph)
        timed = "measure_latency" not in kind.refused if measure_latency is None else measure_latency
        judged = None if evaluation is None else read(evaluation)
        run = _Run(target, rule, scores, choice, described, judged, held, timed, quantiser, rounding)
        return run.carried_out(budget, tuple(frontier or ()))


@dataclass(frozen=True, eq=False)
class _Run:
    """A run of `prune` whose rule is chosen. Any number of models can be made of it.

    Attributes:
        target: What is removed, with the model and the data.
        rule: The allocator.
        scores: The scores that it reads.
        choice: How the rule was chosen; None if the user named it.
        asked: What was asked for, as the report holds it.
        evaluation: The data that the report's figures are measured on; None: held-out ones.
        held: The data that decide on quality; None if none do.
        timed: Whether to time the models.
        quantiser: Quantises the result; None if that was not asked for.
        rounding: How the multiple of kept numbers was measured; empty if it was not.
    """

    target: Target
    rule: Any
    scores: Scores
    choice: Choice | None
    asked: dict[str, Any]
    evaluation: Calibration | None
    held: HeldOut | None
    timed: bool
    quantiser: Quantiser | None = None
    rounding: str = ""

    def carried_out(self, budget: Budget | None, shares: tuple[float, ...] = ()) -> Result:
        """Plan, apply, verify, repair, measure and report; also measure plans that keep these shares."""
        target, task = self.target, self.target.task
        seconds = task.seconds
        met = meet(target, self.rule, self.scores, budget, self.held)
        small, plan = met.small, met.plan
        with clock(seconds, "verify"):
            proof = target.verify(small, plan)
            note = record_of(small).note  # without the doubts, which the report's proof has
            doubts = "" if proof.proven else f"not proven: {'; '.join(proof.doubts)}."
        repaired = met.repaired
        if repaired is None:
            with clock(seconds, "repair"):
                repaired = target.repaired(small, plan)
        for each in {id(m): m for m in (small, repaired)}.values():
            with_note(each, doubts)
        found = None if met.tried is None else met.tried.frontier()
        if shares and self.held is not None:
            found = frontier_at(shares, target, self.rule, self.scores, budget, met.tried, self.held)
        quantised = None if self.quantiser is None else self._quantised(self.quantiser, repaired, budget)
        report = self._report(small, plan, repaired, proof, note, found)
        if quantised is not None:
            report = report.model_copy(update={"quantised": quantised.figures})
        return Result(repaired, plan, self.scores, target.graph, report, quantised, self._at)

    def _quantised(self, quantiser: Quantiser, small: nn.Module, budget: Budget | None) -> Quantised:
        """Quantise the result, judged by the data that judge it."""
        task, held = self.target.task, self.held
        judged = self.evaluation or (task.held if held is None else held.gauge.data)
        with clock(task.seconds, "quantise"):
            return quantiser(
                [("pruned", small)],
                task.fit,
                judged,
                budget=budget if budget is not None and budget.quality else None,
                gauge=None if held is None else held.gauge,
                metric=task.metric,
                loss_fn=task.loss_fn,
                timed=self.timed,
            )

    def _at(self, share: float) -> Result:
        """The whole result for the plan that keeps this share."""
        plans = Plans(self.target, self.rule, self.scores, self.target.budgets[0])
        budget, task = plans.counted(share), self.target.task
        run = replace(self, asked={**self.asked, "budget": budget.as_settings()})
        with without_caches(task.model, lambda: task.example.arguments):
            return run.carried_out(budget)

    def _report(
        self,
        small: nn.Module,
        plan: Any,
        repaired: nn.Module,
        proof: Proof,
        note: str,
        found: Frontier | None,
    ) -> Report:
        target, task = self.target, self.target.task
        repairs = record_of(repaired).repairs
        stages = [("dense", task.model), ("pruned", small)]
        if any(tried["kept"] for tried in repairs):
            stages.append(("repaired", repaired))
        with clock(task.seconds, "measure"):
            measured = [
                evaluate(
                    m,
                    self.evaluation or (task.held if self.held is None else self.held.gauge.data),
                    dense=task.model,
                    loss_fn=task.loss_fn,
                    progress=task.progress,
                    description=f"Measuring {stage}",
                )
                for stage, m in stages
            ]
            costs = target.costs(plan)
            measures = figures(stages, measured, costs, task.example, measure_latency=self.timed)
        choice = self.choice
        return Report(
            model=type(task.model).__name__,
            asked={**self.asked, "allocator": self.asked["allocator"] or plan.allocator},
            rule=plan.allocator,
            settings=dict(plan.settings),
            figures=measures,
            judged_on="held-out calibration data" if self.evaluation is None else "evaluation data",
            calibration=scored_on(self.scores),
            form=record_of(small).form,
            note=note,
            rounding=self.rounding,
            takes=record_of(repaired).takes,
            proof=proof_entry(proof),
            repairs=repairs,
            certificates=dict(plan.certificates),
            description=describe(plan.allocator, plan.certificates, self.rule),
            selection=None if choice is None else choice.selection,
            frontier=found,
            seconds=task.seconds,
            versions=versions(target.graph.device),
            **target.facts(small, plan, self.rule, self.scores),
        )
