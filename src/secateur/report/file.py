"""Writing a text file so that a reader finds the old one or the new one, whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from secateur.errors import SettingError


def write(path: str | Path, text: str) -> Path:
    """Writes beside the target, then moves it there in one step; returns the path.

    Raises:
        SettingError: The file cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"report {str(path)!r}: expected a file that can be written, got {error}. Choose another path."
        ) from error
    return path
