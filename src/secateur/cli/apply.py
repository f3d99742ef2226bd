"""`secateur apply`: a plan carried out, proven and saved."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path

from secateur.cli.artefact import reload_code, written
from secateur.cli.command import READING, command
from secateur.cli.inputs import Inputs
from secateur.cli.output import folder_in_place, folder_to_write
from secateur.config.run import Run


@command(
    "model",
    "plan",
    "artefact",
    "data",
    "input",
    "form",
    "on_unrealisable",
    *READING,
    "seed",
    needs=("model", "plan", "artefact"),
    names={"artefact": "out"},
)
def apply(run: Run, json: bool) -> str:
    """Remove what a plan says, prove it, and save the smaller model, unrepaired."""
    out = folder_to_write(Path(run.artefact or ""))
    import secateur as sc
    from secateur.report.proofs import described

    decided = sc.Plan.from_json(run.plan or "")
    inputs = Inputs(run)
    example = inputs.example if run.input or run.data else None
    small = sc.apply(
        inputs.model,
        decided,
        run.form,
        example_inputs=example,
        on_unrealisable=run.on_unrealisable or "graph",
    )
    # A plan's record may leave out what its form could not express.
    done = sc.record_of(small)
    proof = sc.verify(inputs.model, small, done.plan, example)
    with folder_in_place(out) as folder:
        sc.save(small, folder)
    if json:
        found = {
            "artefact": out.as_posix(),
            "form": done.form,
            "note": done.note,
            "takes": done.takes,
            "proof": asdict(proof),
            "dense": decided.dense.model_dump(),
            "pruned": done.plan.predicted.model_dump(),
        }
        return json_format.dumps(found, indent=1)
    said = [
        str(done.plan),
        f"form {done.form}" + (f": {done.note}" if done.note else ""),
        f"proof: {described(asdict(proof))}",
        f"sizes of the inputs: {done.takes}",
        written(out, reload_code(inputs.source.import_line, out)),
    ]
    return "\n\n".join(said)
