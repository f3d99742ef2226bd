"""What commands write, and where they may."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.artefact.pair import folder_in_place
from secateur.cli.shell import show
from secateur.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

    from secateur.pipeline.quantise import Quantised
    from secateur.report.report import Report


def folder_to_write(out: Path) -> Path:
    """Check that a folder can be written to, before an hour of scoring. Nothing is created yet.

    Raises:
        SettingError: If nothing can be written there.
    """
    nearest = next(place for place in (out, *out.absolute().parents) if os.path.exists(place))
    why = (
        "a file"
        if not os.path.isdir(nearest)
        else "a read-only one"
        if not os.access(nearest, os.W_OK)
        else ""
    )
    if why:
        raise SettingError(
            f"--out {out}: expected a folder that can be written to, got {why}"
            f"{'' if nearest == out else f' at {nearest}'}. Name another."
        )
    return out


def file_to_write(option: str, path: Path) -> Path:
    """Check that a file can be written, before the work begins. Nothing is created yet.

    Raises:
        SettingError: If its folder is missing or read-only, or it is a folder itself.
    """
    if os.path.isdir(path) or not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise SettingError(
            f"{option} {path}: expected a file in a folder that can be written to, got "
            f"{'a folder' if os.path.isdir(path) else f'none at {path.parent}'}. Name another."
        )
    return path


def reload_code(import_line: str, out: Path) -> str:
    """Return Python code that loads the model; `import_line` is the code that defines `make_model`."""
    from secateur.report import sentences

    return sentences.loading(out.as_posix(), import_line)


def write_result(
    small: nn.Module,
    report: Report,
    out: Path,
    reload: str,
    *,
    make_model: str = "",
    quantised: Quantised | None = None,
) -> Report:
    """Save the model and both reports, all or none. Return the report with the folder's path in it.

    Args:
        small: The pruned model.
        report: Its report.
        out: The folder.
        reload: Python code that loads the model, for the HTML page.
        make_model: The line of code that defines ``make_model``. The report keeps it, so that it can be
            rendered again.
        quantised: Written beside them as ``int8.onnx`` or ``int4.onnx``.
    """
    import secateur as sc
    from secateur.report.html import render

    report = report.model_copy(update={"artefact": out.as_posix(), "make_model": make_model})
    with folder_in_place(out) as folder:
        sc.save(small, folder)
        if quantised is not None:
            quantised.save(folder / f"{quantised.figures.kind}.onnx")
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        try:
            page = render(report, reload=reload)
        except SettingError as error:  # Jinja is missing: no reason to lose the model
            show(f"secateur: {out / 'report.html'} was not written. {error}", err=True)
        else:
            (folder / "report.html").write_text(page, encoding="utf-8")
    return report


def written(out: Path, reload: str) -> str:
    """Return the last lines of a command's output: the artefact's folder, and how to load it."""
    return "\n".join([f"written to  {out}", "reload with", *(f"  {line}" for line in reload.splitlines())])
