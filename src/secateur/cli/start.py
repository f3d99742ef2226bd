"""Commands for a first start: `secateur demo` trains and prunes a network; `init` writes a configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.artefact.writing import replace_text
from secateur.cli.output import file_to_write, folder_to_write, reload_code, write_result
from secateur.cli.shell import Debug, Json, Seed, python_command, reported, show
from secateur.errors import SettingError

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
        report = write_result(result.model, result.report, out, reload_code(_IMPORT, out), make_model=_IMPORT)
        command = python_command(
            f"import secateur as sc; {_IMPORT}; print(sc.load({out.as_posix()!r}, make_model))"
        )
        shown = report.to_json().rstrip() if json else table(report, reload=command)
    show(shown)


def init(
    out: Annotated[Path, typer.Option(help="The file.")] = Path("secateur.yaml"),
    model: Annotated[Optional[str], typer.Option(help="Fill in the model.")] = None,  # noqa: UP045
    data: Annotated[Optional[str], typer.Option(help="Fill in the data.")] = None,  # noqa: UP045
    macs: Annotated[
        str | None, typer.Option(help="Fill in the budget: a fraction or a count of MACs.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    debug: Debug = False,
) -> None:
    """Write a configuration with a comment for every setting."""
    with reported(debug=debug):
        from secateur.config.read import read_run
        from secateur.config.write import commented

        file_to_write("--out", out)
        if os.path.exists(out) and not force:
            raise SettingError(f"--out {out}: expected a new file, got one that exists. Give --force.")
        named = {"model": ("--model", model), "data": ("--data", data), "budget.macs": ("--macs", macs)}
        given = {path: value for path, value in named.items() if value[1] is not None}
        run = read_run(options=given)
        values = {
            path: run.budget.macs if path == "budget.macs" else value for path, (_, value) in given.items()
        }
        replace_text(out, commented(values, out.name), SettingError)
    show(
        f"written to  {out}\n\nnext\n  secateur inspect --config {out}\n"
        f"  secateur prune --config {out} --out small"
    )
