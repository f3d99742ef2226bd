"""`secateur init`: a configuration to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.cli.output import file_in_place, file_to_write
from secateur.cli.shell import Debug, reported
from secateur.errors import SettingError


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
        if out.exists() and not force:
            raise SettingError(f"--out {out}: expected a new file, got one that exists. Give --force.")
        named = {"model": ("--model", model), "data": ("--data", data), "budget.macs": ("--macs", macs)}
        given = {path: value for path, value in named.items() if value[1] is not None}
        run = read_run(options=given)
        values = {
            path: run.budget.macs if path == "budget.macs" else value for path, (_, value) in given.items()
        }
        with file_in_place(out) as partial:
            partial.write_text(commented(values, out.name), encoding="utf-8")
    typer.echo(
        f"written to  {out}\n\nnext\n  secateur inspect --config {out}\n"
        f"  secateur prune --config {out} --out small"
    )
