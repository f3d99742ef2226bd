"""`secateur score`: what each unit is worth, as a table that plans are made from."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.command import READING, RULE, command
from secateur.cli.inputs import Inputs, only_units, rule_called
from secateur.cli.output import file_to_write
from secateur.config.run import Run

if TYPE_CHECKING:
    from secateur.score import Scores


@command(
    "model",
    "data",
    "input",
    "scores",
    "signals",
    *RULE,
    "checkpoint",
    "memory",
    "allow_inexact",
    *READING,
    "seed",
    needs=("model", "scores"),
    names={"scores": "out"},
)
def score(run: Run, json: bool) -> str:
    """Score every unit, and write the table. A fifth of the data is held out, as prune does it."""
    only_units("score", run)
    out = file_to_write("--out", Path(run.scores or ""))
    import secateur as sc

    inputs = Inputs(run)
    signals = run.signals or rule_called(run, run.single_rule).signals
    graph = sc.trace(inputs.model, inputs.example, allow_inexact=run.allow_inexact)
    scores = sc.score(
        graph,
        None if run.data is None else inputs.data.split()[0],
        signals,
        seed=run.seed,
        memory=run.memory,
        checkpoint=run.checkpoint,
    )
    scores.save(out)
    found = describe(scores, out)
    return json_format.dumps(found, indent=1) if json else listing(found)


def describe(scores: Scores, out: Path) -> dict[str, Any]:
    """What the table holds, as plain data: of each signal and group the least, the median and the most."""
    import numpy as np

    return {
        "written": out.as_posix(),
        "samples": scores.samples,
        "classes": scores.classes,
        "seed": scores.seed,
        "signals": {
            signal: [
                {
                    "group": group,
                    "units": len(values),
                    "least": float(values.min()),
                    "median": float(np.median(values)),
                    "most": float(values.max()),
                }
                for group, values in scores[signal].items()
            ]
            for signal in scores.signals
        },
    }


def listing(found: dict[str, Any]) -> str:
    """What `describe` returned, for a terminal."""
    rows = [(signal, each) for signal, groups in found["signals"].items() for each in groups]
    first = max(len(name) for name in ("signal", *found["signals"]))
    second = max(len(name) for name in ("group", *(each["group"] for _, each in rows)))
    head = f"{'signal':{first}}  {'group':{second}}  {'units':>6}" + "".join(
        f"  {name:>10}" for name in ("least", "median", "most")
    )
    lines = [
        f"{signal:{first}}  {each['group']:{second}}  {each['units']:>6,}  "
        + "  ".join(f"{each[name]:>10.4g}" for name in ("least", "median", "most"))
        for signal, each in rows
    ]
    about = f"{found['samples']:,} samples of {found['classes']} classes read; higher is worth more"
    return "\n".join([head, *lines, "", about, f"written to  {found['written']}"])
