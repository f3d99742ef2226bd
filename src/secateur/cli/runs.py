"""`secateur compare-runs`: the reports of several runs beside each other."""

from __future__ import annotations

import json as json_format
import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.cli.output import file_to_write
from secateur.cli.saved import REPORT
from secateur.cli.shell import Debug, Json, reported, show

# Optional[...] rather than | None: typer reads these at run time, where older Pythons need it.
Place = Optional[Path]  # noqa: UP045


def compare_runs(
    sources: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders that prune wrote, or report.json files.")
    ],
    html: Annotated[Place, typer.Option(help="Write one page into this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show several runs beside each other: costs, quality, and what each layer kept."""
    with reported(debug=debug):
        if html is not None:
            file_to_write("--html", html)
        from secateur.artefact.writing import replace_text
        from secateur.errors import SettingError
        from secateur.report.report import Report
        from secateur.report.runs import TITLES, Runs

        found = Runs.of(
            [(p.as_posix(), Report.from_json(p / REPORT if os.path.isdir(p) else p)) for p in sources]
        )
        if html is not None:
            replace_text(html, found.html(), SettingError)
        shown = str(found)
        if json:
            layers = {
                label: {b.run: {"kept": b.kept, "total": b.total} for b in bars}
                for label, bars in found.layers()
            }
            runs = [dict(zip(TITLES, row, strict=True)) for row in found.rows()]
            shown = json_format.dumps({"runs": runs, "layers": layers, "doubts": found.doubts()}, indent=1)
        elif html is not None:
            shown += f"\n\npage in    {html}"
    show(shown)
