"""`secateur prune`: the whole pipeline for a user's own model."""

from __future__ import annotations

from pathlib import Path

from secateur.cli.artefact import reload_code, write
from secateur.cli.command import BUDGET, LIMITS, READING, RULE, command
from secateur.cli.inputs import Inputs, budget_of, limits_of, rule_of
from secateur.cli.output import folder_to_write
from secateur.config.run import Run


@command(
    "model",
    "data",
    "artefact",
    *BUDGET,
    "budget.latency",
    "budget.sparsity",
    "budget.experts",
    "granularity",
    *RULE,
    "steps",
    "repair",
    *LIMITS,
    "allow_inexact",
    "form",
    "on_unrealisable",
    "evaluation",
    *READING,
    "seed",
    needs=("model", "data", "artefact"),
    names={"artefact": "out"},
)
def prune(run: Run, json: bool) -> str:
    """Prune a model: trace, score, allocate, apply, verify, repair, save."""
    out = folder_to_write(Path(run.artefact or ""))
    import secateur as sc
    from secateur.report.text import table

    inputs = Inputs(run)
    result = sc.prune(
        inputs.model,
        inputs.data,
        budget_of(run),
        rule_of(run),
        run.granularity,
        repair=run.repairs,
        limits=limits_of(run),
        steps=run.steps,
        form=run.form,
        on_unrealisable=run.on_unrealisable or "leave",
        evaluation=inputs.evaluation,
        allow_inexact=run.allow_inexact,
        seed=run.seed,
    )
    reload = reload_code(inputs.source.import_line, out)
    report = write(result.model, result.report, out, reload, make_model=inputs.source.import_line)
    return report.to_json().rstrip() if json else table(report, reload=reload)
