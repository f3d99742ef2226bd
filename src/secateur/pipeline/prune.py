"""The whole pipeline in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from secateur.allocators import Budget, Limits
from secateur.allocators.registry import Allocates, describe
from secateur.calibration import Calibration, Forward, View, Views
from secateur.common.models import device_of, unwrap
from secateur.common.modes import require_plain_modes, require_values
from secateur.config.names import Granularity
from secateur.errors import SettingError
from secateur.measure.evaluate import evaluate
from secateur.pipeline.auto.chooser import Choice, Chooser
from secateur.pipeline.auto.choosers import chooser_of
from secateur.pipeline.result import Result, asked_for, check_labels, clock, figures, proof_entry, scored_on
from secateur.pipeline.targets.experts import Experts
from secateur.pipeline.targets.target import Form, Target, Task
from secateur.pipeline.targets.together import Both
from secateur.pipeline.targets.units import Units
from secateur.pipeline.targets.weights import SingleWeights
from secateur.repairs.methods import Methods
from secateur.report.data import versions
from secateur.report.report import Report
from secateur.signals import Scores
from secateur.signals.distributed import joined
from secateur.signals.loss import LossFn, loss_name
from secateur.targets.granularity import granularity_of, refusal
from secateur.targets.units.record import record_of, with_note

TARGETS: Mapping[str, type[Target]] = MappingProxyType(
    {"unit": Units, "weight": SingleWeights, "expert": Experts, "unit+expert": Both}
)
"""What may be removed, by the name of its granularity."""


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
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    views: int | Views | View | None = None,
    allow_inexact: bool = False,
    measure_latency: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Trace, score, allocate, apply, verify and repair.

    Args:
        model: Any module that `torch.export` can capture; it is left as it was.
        calibration: A DataLoader, Dataset or iterable of batches. A fifth of it is held out to choose
            and judge repairs; scores and repairs see the rest.
        budget: What the result may cost; None lets the rule decide.
        allocator: A name or an instance: ``"tod"``, ``sc.ToD(tolerance=0.05)``, ``sc.Uniform(ratio=0.3)``.
            ``"auto"``: rules compete on held-out data (`sc.Auto`), which is what None stands for; for single
            weights it stands for ``"emp"``, for experts for ``"tod"``. ``"search"``: for units, budget is
            moved between groups as measured models tell (`sc.Search`).
        granularity: What is removed. ``"unit"``: channels, neurons, heads, hidden units. ``"weight"``: single
            weights, which become zero. ``"expert"``: experts of a mixture-of-experts model, which need not
            be captured. ``["unit", "expert"]``: both under one budget; one knob decides on all groups.
        repair: None, a name, a list of names, or ``"auto"``. For single weights also ``"surgeon"``: the
            second-order update of linear layers, from the dense weights on, so it comes first where there are
            several. For experts ``"experts"``, which ``"auto"`` stands for: it is kept if the held-out loss
            is no worse for it.
        limits: What must stay: multiples, minimum, groups to leave alone.
        steps: Rounds in which units or experts are removed, the model repaired and scored anew, each of which
            takes the same fraction of what is left; needs a budget of macs, params or experts.
        form: As for `apply`.
        on_unrealisable: What happens to groups that no module can express: ``leave`` keeps them whole and
            spends the budget on the others; ``graph`` returns a captured program. The note names them.
        evaluation: Data that the report's accuracy is measured on; the held-out part if not given.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of a batch, instead of the default.
        forward: ``forward(model, batch)`` calls the model on what the loader gives:
            ``lambda model, batch: model(batch["image"])``. Needed where batches are neither tensors, nor
            ``(inputs, labels)``, nor mappings whose keys are arguments.
        views: In how many views each sample serves for scores and repairs, itself included: a number for
            crops and mirror images of pictures, or `Views`, or your own ``view(inputs, k, generator)``. What
            is held out is measured as it is. None: as `calibration` says, or one.
        allow_inexact: As for `trace`.
        measure_latency: Time the models on this machine (a few dozen forward passes). None: unless single
            weights are removed, which changes no time.
        seed: Seed for all random choices. Same inputs and seed, same plan.
        progress: Show bars on a terminal.

    Returns:
        The model, the plan (for single weights a `MaskPlan`), the scores, the graph and the report.

    Raises:
        SettingError: A setting is wrong, or means nothing for this granularity.
        SecateurError: One of its kinds; see each step.
    """
    what = granularity_of(granularity)
    kind = _checked(what, form, budget, steps, allow_inexact, on_unrealisable, measure_latency)
    decider: Any = kind.default if allocator is None else allocator
    chooser = chooser_of(decider)
    if chooser is None:
        decider = kind.rule(decider)
    else:
        chooser.check("prune", what)
    kind.check_repair(repair)  # a wrong name is refused now, not after scoring
    model = unwrap(model)
    require_plain_modes("prune", model)
    require_values("prune", model)
    if isinstance(limits, Limits):  # modules are found in this model, not in those of later rounds
        limits = limits.named(dict(model.named_parameters(remove_duplicate=False)))

    def read(given: Any, views: int | Views | View | None = None) -> Calibration:
        return Calibration.of(given, seed=seed, forward=forward, model=model, views=views)

    with joined(device_of(model)) as team:
        with team.together():
            task = Task(
                model,
                read(calibration, views),
                limits,
                repair,
                form,
                on_unrealisable,
                allow_inexact,
                steps,
                loss_fn,
                seed,
                progress,
            )
            if evaluation is None:
                check_labels(model, task.example, loss_fn)
        team.agree(
            "prune",
            model,
            task.data,
            budget=budget,
            allocator=decider,
            repair=repair,
            limits=limits,
            settings=(what, form, on_unrealisable, allow_inexact, steps, seed, views),
        )
        target = kind(task)
        choice, asked = None, budget
        if chooser is not None:
            with clock(task.seconds, "score"):
                known = target.scored(chooser.candidates_for(target).values())
            with clock(task.seconds, "choose"):
                choice = chooser.choose(target, budget, known)
            rule, scores, budget = choice.rule, choice.scores, choice.budget
        else:
            with clock(task.seconds, "score"):
                scores = target.score([decider])
            with clock(task.seconds, "curves"):
                rule = target.measured(decider, task.fit, scores)
        described = asked_for(
            asked,
            chooser.name if chooser else "",  # that of the plan: a rule of the user's own has no name
            what,
            repair,
            form,
            seed,
            loss=loss_name(loss_fn, task.example),
            **({} if "allow_inexact" in kind.refused else {"allow_inexact": allow_inexact}),
            **({"steps": steps} if steps > 1 else {}),
            **({"views": task.data.repeats} if task.data.repeats > 1 else {}),
            **({} if on_unrealisable == "leave" else {"on_unrealisable": on_unrealisable}),
        )
        timed = "measure_latency" not in kind.refused if measure_latency is None else measure_latency
        judged = None if evaluation is None else read(evaluation)
        return _carried_out(target, rule, scores, budget, choice, described, judged, timed=timed)


def _carried_out(
    target: Target,
    rule: Any,
    scores: Scores,
    budget: Budget | None,
    choice: Choice | None,
    asked: dict[str, Any],
    evaluation: Calibration | None,
    *,
    timed: bool,
) -> Result:
    """Plan, apply, verify, repair, measure and report, once the rule is chosen."""
    task = target.task
    model, seconds = task.model, task.seconds
    small, plan = target.carry_out(rule, scores, budget)
    with clock(seconds, "verify"):
        proof = target.verify(small, plan)
        note = record_of(small).note  # without the doubts, which the report's proof has
        if not proof.proven:
            with_note(small, f"not proven: {'; '.join(proof.doubts)}.")
    with clock(seconds, "repair"):
        repaired = target.repaired(small, plan)
    repairs = record_of(repaired).repairs
    stages = [("dense", model), ("pruned", small)]
    if any(tried["kept"] for tried in repairs):
        stages.append(("repaired", repaired))
    with clock(seconds, "measure"):
        measured = [
            evaluate(
                m,
                task.held if evaluation is None else evaluation,
                dense=model,
                loss_fn=task.loss_fn,
                progress=task.progress,
                description=f"Measuring {stage}",
            )
            for stage, m in stages
        ]
        measures = figures(stages, measured, target.costs(plan), task.example, measure_latency=timed)
    report = Report(
        model=type(model).__name__,
        asked={**asked, "allocator": asked["allocator"] or plan.allocator},
        rule=plan.allocator,
        settings=dict(plan.settings),
        figures=measures,
        judged_on="held-out calibration data" if evaluation is None else "evaluation data",
        calibration=scored_on(scores),
        form=record_of(small).form,
        note=note,
        takes=record_of(repaired).takes,
        proof=proof_entry(proof),
        repairs=repairs,
        certificates=dict(plan.certificates),
        description=describe(plan.allocator, plan.certificates, rule),
        selection=None if choice is None else choice.selection,
        seconds=seconds,
        versions=versions(target.graph.device),
        **target.facts(small, plan, rule, scores),
    )
    return Result(repaired, plan, scores, target.graph, report)


def target_called(function: str, granularity: str) -> type[Target]:
    """What is removed.

    Raises:
        SettingError: There is no granularity of this name.
    """
    if granularity not in TARGETS:
        raise SettingError(
            f"{function}(granularity={granularity!r}): expected 'unit', 'weight', 'expert' or "
            "['unit', 'expert']."
        )
    return TARGETS[granularity]


_UNSET = {"steps": 1, "allow_inexact": False, "on_unrealisable": "leave", "measure_latency": False}


def check_options(function: str, granularity: str, form: str, **options: Any) -> None:
    """Refuses a form and options that a granularity does not have.

    Args:
        function: For messages.
        granularity: What is removed.
        form: The form that was asked for.
        options: Further options by name.

    Raises:
        SettingError: If one means nothing there.
    """
    kind = TARGETS[granularity]
    if form not in kind.forms:
        raise SettingError(
            f"{function}(form={form!r}): expected one of {', '.join(kind.forms)} with granularity "
            f"{granularity!r}."
        )
    for name, value in options.items():
        if value != _UNSET[name] and name in kind.refused:
            raise refusal(f"{function}({name}={value!r})", granularity, kind.refused[name])


def _checked(
    granularity: str,
    form: str,
    budget: Budget | None,
    steps: int,
    allow_inexact: bool,
    on_unrealisable: str,
    measure_latency: bool | None,
) -> type[Target]:
    """What is removed; refuses options that are wrong, or that it does not have."""
    kind = target_called("prune", granularity)
    check_options(
        "prune",
        granularity,
        form,
        steps=steps,
        allow_inexact=allow_inexact,
        on_unrealisable=on_unrealisable,
        measure_latency=bool(measure_latency),
    )
    if type(steps) is not int or steps < 1 or (steps > 1 and budget is None):
        raise SettingError(
            f"prune(steps={steps!r}): expected a number of rounds of at least 1, and for several a budget. "
            "Pass these, or leave steps out."
        )
    if on_unrealisable not in ("graph", "leave"):
        raise SettingError(f"prune(on_unrealisable={on_unrealisable!r}): expected 'graph' or 'leave'.")
    return kind
