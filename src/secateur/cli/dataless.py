"""`secateur prune` without data, for rules that read weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.inputs import Inputs, budget_of, limits_of, single_rule_of
from secateur.cli.loading import example_of
from secateur.config.run import Run
from secateur.errors import CalibrationError, SettingError

if TYPE_CHECKING:
    from secateur.pipeline.result import Result

BATCHES = 4
JUDGED = "random inputs of the given sizes"
RULES = "--allocator uniform or --allocator global"


def prune_without_data(run: Run, inputs: Inputs) -> Result:
    """Prune by weights alone; the outputs are compared with the dense model's on random inputs.

    Raises:
        SettingError: Something that was asked for needs data, or there is no `--input` either.
        CalibrationError: The rule or its signals need data.
    """
    _check(run)
    import secateur as sc
    from secateur.pipeline.options import TARGETS

    rule = single_rule_of(run)
    try:  # by the same calls that data go to, so that what needs them says so
        scores = sc.score(inputs.graph, None, rule.signals, seed=run.seed, progress=False)
        TARGETS[run.granularity].with_curves(rule, inputs.graph, None, scores)
    except CalibrationError as error:
        raise CalibrationError(
            f"secateur prune: expected --data for allocator {run.single_rule}, which needs some "
            f"({error}) Give --data, or {RULES} --removal magnitude."
        ) from error
    result = sc.prune(
        inputs.model,
        [_drawn(run, seed) for seed in range(BATCHES)],
        budget_of(run),
        rule,
        run.granularity,
        repair=None,
        limits=limits_of(run),
        steps=run.steps,
        form=run.form,
        on_unrealisable=run.on_unrealisable or "leave",
        evaluation=inputs.evaluation,
        allow_inexact=run.allow_inexact,
        seed=run.seed,
    )
    judged = result.report.judged_on if run.evaluation else JUDGED
    report = result.report.model_copy(update={"judged_on": judged, "calibration": {}, "lacking": ""})
    return sc.Result(result.model, result.plan, result.scores, result.graph, report)


def _check(run: Run) -> None:
    """Refuse what needs data, before anything is loaded."""
    if not run.input:
        raise SettingError(
            "secateur prune: expected --data, or --input for a rule that needs none, got neither. Write "
            f"--data x.npz, or --input 1x3x224x224 {RULES}, for example."
        )
    if run.rule in ("auto", "search"):
        raise SettingError(
            f"secateur prune: expected --data for allocator {run.rule}, which tries rules on data, got only "
            f"--input. Give --data, or {RULES}."
        )
    needing = {
        "repair": "repair" in run.model_fields_set and run.repairs is not None,
        "quantise": run.quantise is not None,
        "checkpoint": run.checkpoint is not None,
        "held-out": run.held_out is not None,
        "frontier": bool(run.frontier),
        "views": run.views is not None,
        "max-drop": run.budget.accuracy_drop is not None,
        "max-loss-rise": run.budget.loss_rise is not None,
        "max-perplexity-rise": run.budget.perplexity_rise is not None,
    }
    for name, asked in needing.items():
        if asked:
            raise SettingError(
                f"--{name}: expected it together with --data, which it reads, got only --input. Give --data, "
                "or leave it out."
            )


def _drawn(run: Run, seed: int) -> Any:
    """A batch of the sizes of `--input`: floats are normally distributed, integers zero."""
    values = tuple(example_of(text, seed=seed) for text in run.input)
    return (values if len(values) > 1 else values[0],)
