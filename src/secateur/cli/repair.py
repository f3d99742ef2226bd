"""`secateur repair`: an artefact repaired in closed form."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.cli.artefact import reload_code, written
from secateur.cli.command import READING, command
from secateur.cli.inputs import Inputs
from secateur.cli.output import folder_in_place, folder_to_write
from secateur.config.run import Run
from secateur.errors import SettingError


@command(
    "artefact",
    "model",
    "data",
    "repaired",
    "repair",
    *READING,
    "seed",
    needs=("artefact", "model", "data", "repaired"),
    names={"repaired": "out"},
)
def repair(run: Run, json: bool) -> str:
    """Undo what can be undone of the damage in an artefact, without training, and save the result."""
    methods = run.repairs
    if methods is None:
        raise SettingError("--repair none: expected a repair, got none. Leave it out, or name one.")
    out = folder_to_write(Path(run.repaired or ""))
    import secateur as sc

    inputs = Inputs(run)
    small = sc.load(run.artefact or "", inputs.source.make)
    before = sc.record_of(small)
    inexact = not all(group.exact for group in before.plan.groups)
    graph = sc.trace(inputs.model, inputs.example, allow_inexact=inexact)
    better = sc.repair(small, inputs.model, inputs.data, methods, graph=graph, seed=run.seed)
    with folder_in_place(out) as folder:
        sc.save(better, folder)
    tried = sc.record_of(better).repairs[len(before.repairs) :]
    if json:
        return json_format.dumps({"artefact": out.as_posix(), "repairs": list(tried)}, indent=1)
    lines = [_line(each) for each in tried]
    if not any(each["kept"] for each in tried):
        lines.append("Nothing that was tried helped: the model is as it was.")
    return "\n".join([*lines, "", written(out, reload_code(inputs.source.import_line, out))])


def _line(tried: Mapping[str, Any]) -> str:
    if "why" in tried:
        return f"{tried['method']}: not done, {tried['why']}"
    return (
        f"{tried['method']}: {'kept' if tried['kept'] else 'not kept'}; {tried['measure']} "
        f"{tried['before']:.4g} before and {tried['after']:.4g} after, on {tried['held_out_samples']} "
        "samples held out"
    )
