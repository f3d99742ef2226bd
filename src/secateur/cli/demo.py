"""`secateur demo`: from nothing to a pruned, proven and saved network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.artefact import reload_code, write
from secateur.cli.output import folder_to_write
from secateur.cli.shell import Debug, Json, Seed, python_command, reported

MACS = 0.5
_IMPORT = "from secateur.demo.network import make_model"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, report.json and report.html.")] = Path(
        "demo"
    ),
    seed: Seed = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Train for a few epochs only, to try the command.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small network on handwritten digits, prune it to half its MACs, prove it and save it."""
    with reported(debug=debug):
        folder_to_write(out)
        import secateur as sc
        from secateur.demo.digits import load_digits
        from secateur.demo.train import EPOCHS, QUICK_EPOCHS, one_thread, train
        from secateur.report.text import table

        digits = load_digits()
        with one_thread():
            model = train(digits.images, digits.labels, epochs=QUICK_EPOCHS if quick else EPOCHS, seed=seed)
            result = sc.prune(
                model, digits.calibration, sc.Budget(macs=MACS), evaluation=digits.test, seed=seed
            )
        report = write(result.model, result.report, out, reload_code(_IMPORT, out), make_model=_IMPORT)
        command = python_command(
            f"import secateur as sc; {_IMPORT}; print(sc.load({out.as_posix()!r}, make_model))"
        )
        shown = report.to_json().rstrip() if json else table(report, reload=command)
    typer.echo(shown)
