"""`Report`: the data of a run, with methods that write it as text, HTML, Markdown and JSON."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from secateur.artefact.writing import replace_text
from secateur.common.inert import inert
from secateur.common.paths import path_named
from secateur.common.reading import complaint, parse_json, read_text
from secateur.errors import ArtefactError, SettingError
from secateur.report.data import FORMAT, Facts
from secateur.report.html import render
from secateur.report.markdown import document
from secateur.report.text import table

LARGEST = 1 << 26
"""The most bytes of a report's file."""


class Report(Facts):
    """The report of a run of `prune`: ``print(report)``, `to_html`, `to_markdown`, `to_json`."""

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON. If `path` is given, also write it to that file.

        Raises:
            SettingError: If the file cannot be written.
        """
        text = inert(self.model_dump_json(indent=1)) + "\n"
        if path is not None:
            replace_text(path_named("report.to_json", path, SettingError), text, SettingError)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Report:
        """Read a report.

        Args:
            source: The JSON text itself (it starts with ``{``), or the path of a file that holds it.

        Raises:
            ArtefactError: If there is no such file, it holds no report, or a newer version wrote it.
        """
        where, text = "report", source
        if not (isinstance(source, str) and source.lstrip().startswith("{")):
            path = path_named("report", source)
            where = f"report {str(path)!r}"
            text = read_text(path, LARGEST, where, ArtefactError, "a readable file of JSON")
        return _shown(where, _parsed(where, str(text)))

    def read_from(self, where: str) -> Report:
        """This report, which remembers that it was read, and from where; returns itself."""
        object.__setattr__(self, "_origin", where)  # beside the data: neither compared nor written
        return self

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML page, and return its path.

        Raises:
            SettingError: If Jinja, which writes the page, is missing, or the file cannot be written.
        """
        place = path_named("report.to_html", path, SettingError)
        replace_text(place, render(self), SettingError)
        return place

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return the report as Markdown. If `path` is given, also write it to that file."""
        text = document(self)
        if path is not None:
            replace_text(path_named("report.to_markdown", path, SettingError), text, SettingError)
        return text

    def __str__(self) -> str:
        """Return the text that `secateur prune` prints."""
        return table(self)


def _shown(where: str, report: Report) -> Report:
    """The report, which is marked as read from elsewhere, once it was shown in every form.

    Raises:
        ArtefactError: It cannot be shown.
    """
    found = report.read_from(where)
    try:
        table(found), document(found)
        with suppress(SettingError):  # without Jinja
            render(found)
    except Exception as error:  # numbers and texts of a stranger may go wrong anywhere
        raise ArtefactError(
            f"{where}: expected a report that can be shown, got one that cannot "
            f"({type(error).__name__}: {str(error)[:80]}). Write the report again."
        ) from error
    return found


def _parsed(where: str, text: str) -> Report:
    try:
        data = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(
            f"{where}: expected JSON, got text that is damaged or cut short ({error}). "
            "Write the report again."
        ) from error
    written = data.get("format", FORMAT) if isinstance(data, dict) else None
    if type(written) is not int:
        raise ArtefactError(
            f"{where}: expected a report, got JSON whose format is {repr(written)[:40]}. "
            "Pass what Report.to_json wrote."
        )
    if written > FORMAT:
        raise ArtefactError(
            f"{where}: expected format {FORMAT}, got format {written}, which a newer secateur wrote. "
            "Upgrade secateur to read it."
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        raise ArtefactError(
            f"{where}: expected a report of format {FORMAT}, got {complaint(error)}. Write the report again."
        ) from error
