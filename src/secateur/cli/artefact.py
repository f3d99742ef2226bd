"""The folder that a result is written to, and how it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from secateur.cli.output import folder_in_place
from secateur.errors import SettingError
from secateur.report import words

if TYPE_CHECKING:
    from torch import nn

    from secateur.report.report import Report


def reload_code(import_line: str, out: Path) -> str:
    """Python that loads the model again; `import_line` defines `make_model`."""
    return (
        f"import secateur as sc\n{import_line}\nmodel = sc.load({words.quoted(out.as_posix())}, make_model)"
    )


def write(small: nn.Module, report: Report, out: Path, reload: str, *, make_model: str = "") -> Report:
    """Save the model and both reports, all or none; returns the report with the place in it.

    `make_model` is the line that defines ``make_model``: with it the report can be rendered again.
    """
    import secateur as sc
    from secateur.report.html import render

    report = report.model_copy(update={"artefact": out.as_posix(), "make_model": make_model})
    with folder_in_place(out) as folder:
        sc.save(small, folder)
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        try:
            page = render(report, reload=reload)
        except SettingError as error:  # Jinja is missing: no reason to lose the model
            typer.echo(f"secateur: {out / 'report.html'} was not written. {error}", err=True)
        else:
            (folder / "report.html").write_text(page, encoding="utf-8")
    return report


def written(out: Path, reload: str) -> str:
    """Where the artefact is and how to read it, to end what a terminal shows."""
    return "\n".join([f"written to  {out}", "reload with", *(f"  {line}" for line in reload.splitlines())])
