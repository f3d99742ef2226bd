"""`secateur plan`: from a table of scores to a decision, without scoring again."""

from __future__ import annotations

from pathlib import Path

from secateur.cli.command import BUDGET, LIMITS, READING, RULE, command
from secateur.cli.inputs import Inputs, budget_of, limits_of, only_units, single_rule_of
from secateur.cli.output import file_to_write
from secateur.config.run import Run


@command(
    "model",
    "scores",
    "plan",
    "data",
    "input",
    *BUDGET,
    *RULE,
    *LIMITS,
    "allow_inexact",
    *READING,
    "seed",
    needs=("model", "scores", "plan"),
    names={"plan": "out"},
)
def plan(run: Run, json: bool) -> str:
    """Decide from scores what goes, and write the decision. Data serve as example inputs."""
    only_units("plan", run)
    out = file_to_write("--out", Path(run.plan or ""))
    import secateur as sc
    from secateur.allocate.unit_distortions import with_unit_curves

    rule = single_rule_of(run)
    scores = sc.Scores.load(run.scores or "")
    inputs = Inputs(run)
    graph = sc.trace(inputs.model, inputs.example, allow_inexact=run.allow_inexact)
    fit = None if run.data is None else inputs.data.split()[0]
    decided = with_unit_curves(rule, graph, fit, scores, progress=True).allocate(
        graph, scores, budget_of(run), limits_of(run), run.seed
    )
    text: str = decided.to_json(out)
    return text.rstrip() if json else f"{decided}\n\nwritten to  {out}"
