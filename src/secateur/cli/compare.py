"""`secateur compare`: several rules at equal budgets, for a user's own model."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from secateur.cli.command import LIMITS, READING, command
from secateur.cli.inputs import Inputs, contender, limits_of, only_units
from secateur.cli.output import file_in_place
from secateur.config.run import Run


@command(
    "model",
    "data",
    "compare.rules",
    "compare.macs",
    "removal",
    "repair",
    *LIMITS,
    "allow_inexact",
    "form",
    "evaluation",
    "compare.plot",
    *READING,
    "seed",
    needs=("model", "data"),
)
def compare(run: Run, json: bool) -> str:
    """Compare rules at equal MACs: what each leaves of the accuracy, as pruned and repaired."""
    only_units("compare", run)
    import secateur as sc
    from secateur.compare import compare as compare_rules
    from secateur.compare import draw
    from secateur.report.plot import check

    asked = run.compare
    plot = None if asked.plot is None else Path(asked.plot)
    if plot is not None:
        check(plot)
    inputs = Inputs(run)
    found = compare_rules(
        inputs.model,
        inputs.data,
        {name: contender(run, name) for name in asked.rules},
        [sc.Budget(macs=share) for share in sorted(asked.macs, reverse=True)],
        run.repairs,
        limits=limits_of(run),
        form=run.form,
        evaluation=inputs.evaluation,
        allow_inexact=run.allow_inexact,
        seed=run.seed,
    )
    if plot is not None:
        with file_in_place(plot) as partial:
            draw(found, partial)
    if json:
        return json_format.dumps(found.to_dict(), indent=1)
    return str(found) + ("" if plot is None else f"\n\nwritten to  {plot}")
