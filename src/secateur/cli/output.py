"""What commands write, and where they may."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from secateur.artefact.writing import folder_in_place
from secateur.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

    from secateur.report.report import Report


def folder_to_write(out: Path) -> Path:
    """Refuse now what cannot be written: better than after an hour of scoring. Nothing is made yet.

    Raises:
        SettingError: If nothing can be written there.
    """
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    why = "a file" if not nearest.is_dir() else "a read-only one" if not os.access(nearest, os.W_OK) else ""
    if why:
        raise SettingError(
            f"--out {out}: expected a folder that can be written to, got {why}"
            f"{'' if nearest == out else f' at {nearest}'}. Name another."
        )
    return out


def file_to_write(option: str, path: Path) -> Path:
    """Refuse now a file that cannot be written.

    Raises:
        SettingError: If its folder is missing or read-only, or it is a folder itself.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SettingError(
            f"{option} {path}: expected a file in a folder that can be written to, got "
            f"{'a folder' if path.is_dir() else f'none at {path.parent}'}. Name another."
        )
    return path


def reload_code(import_line: str, out: Path) -> str:
    """Python that loads the model again; `import_line` defines `make_model`."""
    from secateur.report import sentences

    return sentences.loading(out.as_posix(), import_line)


def write_result(small: nn.Module, report: Report, out: Path, reload: str, *, make_model: str = "") -> Report:
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
