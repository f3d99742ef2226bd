"""`Report`: the data of a run, with methods that write it as text, HTML, Markdown and JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError

from secateur.artefact.writing import replace_text
from secateur.errors import ArtefactError, SettingError
from secateur.report.data import FORMAT, Facts
from secateur.report.html import render
from secateur.report.markdown import document
from secateur.report.text import table


class Report(Facts):
    """The report of a run of `prune`: ``print(report)``, `to_html`, `to_markdown`, `to_json`."""

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON. If `path` is given, also write it to that file.

        Raises:
            SettingError: If the file cannot be written.
        """
        text = self.model_dump_json(indent=1) + "\n"
        if path is not None:
            replace_text(Path(path), text, SettingError)
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
            where = f"report {os.fspath(source)!r}"
            try:
                text = Path(source).read_bytes().decode("utf-8")
            except (OSError, ValueError) as error:
                raise ArtefactError(
                    f"{where}: expected a readable file of JSON, got {error}. "
                    "Name the folder or the file that secateur prune wrote."
                ) from error
        return _parsed(where, str(text))

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML page, and return its path.

        Raises:
            SettingError: If Jinja, which writes the page, is missing, or the file cannot be written.
        """
        replace_text(Path(path), render(self), SettingError)
        return Path(path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return the report as Markdown. If `path` is given, also write it to that file."""
        text = document(self)
        if path is not None:
            replace_text(Path(path), text, SettingError)
        return text

    def __str__(self) -> str:
        """Return the text that `secateur prune` prints."""
        return table(self)


def _parsed(where: str, text: str) -> Report:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(
            f"{where}: expected JSON, got text that is damaged or cut short ({error}). "
            "Write the report again."
        ) from error
    written = data.get("format", FORMAT) if isinstance(data, dict) else None
    if type(written) is not int:
        raise ArtefactError(
            f"{where}: expected a report, got JSON whose format is {written!r}. "
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
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(
            f"{where}: expected a report of format {FORMAT}, got {first['msg']} (in {place or 'all of it'}). "
            "Write the report again."
        ) from error
