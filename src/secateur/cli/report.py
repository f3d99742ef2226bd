"""`secateur report`: what an earlier run wrote down, shown again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.cli.shell import Debug, Json, reported
from secateur.errors import SettingError

REPORT = "report.json"
"""In an artefact's folder."""

# Optional[...] rather than | None: typer reads it at run time, where older Pythons need it.
Place = Optional[Path]  # noqa: UP045


def report(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that prune wrote, or a report.json.")],
    html: Annotated[Place, typer.Option(help="Write the page into this file.")] = None,
    markdown: Annotated[Place, typer.Option(help="Write the same as Markdown into this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the report of an earlier run again, and write it as a page or as Markdown."""
    with reported(debug=debug):
        places = {"--html": html, "--markdown": markdown}
        for option, place in places.items():
            _check(option, place)
        from secateur.report.report import Report

        found = Report.from_json(source / REPORT if source.is_dir() else source)
        if source.is_dir() and found.artefact is not None:
            # A folder may have been moved since: it is read back from where it is now.
            found = found.model_copy(update={"artefact": source.as_posix()})
        if html is not None:
            found.to_html(html)
        if markdown is not None:
            found.to_markdown(markdown)
        shown = found.to_json().rstrip() if json else str(found)
        written = [str(place) for place in places.values() if place is not None]
        if written and not json:
            shown += f"\n\nreport in   {', '.join(written)}"
    typer.echo(shown)


def _check(option: str, place: Path | None) -> None:
    """Refuse what cannot be written before the other file is."""
    if place is None:
        return
    if place.is_dir() or not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        got = "a folder" if place.is_dir() else f"no such place in {str(place.parent)!r}"
        raise SettingError(
            f"{option} {place}: expected a file in a folder that can be written to, got {got}. Name another."
        )
