"""Paths that a user gives: what is no path is refused in words."""

from __future__ import annotations

import os
from pathlib import Path

from secateur.errors import ArtefactError, SecateurError


def path_named(
    where: str,
    path: str | os.PathLike[str],
    error: type[SecateurError] = ArtefactError,
    what: str = "a path",
) -> Path:
    """The path, unless it is empty: pathlib takes that for the current folder.

    Ask what is there with `os.path`: pathlib's own questions raise where a name is too long.

    Args:
        where: How the message begins.
        path: What the user gave.
        error: The class of the error.
        what: What was expected, for the message.

    Raises:
        SecateurError: It is empty, or no path.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise error(f"{where}: expected {what}, got {type(path).__name__}. Name a place, as text.")
    if not os.fspath(path):
        raise error(f"{where}: expected {what}, got ''. Name a place; the current folder is '.'.")
    return Path(path)


def entries(folder: Path, where: str, error: type[SecateurError] = ArtefactError) -> list[Path]:
    """What is in a folder, in the order of names.

    Raises:
        SecateurError: It cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as refused:
        raise error(
            f"{where}: expected a folder that can be read, got {str(folder)!r}, which cannot be "
            f"({refused.strerror}). Check its permissions."
        ) from refused


def require_folder(folder: Path, where: str, error: type[SecateurError] = ArtefactError) -> None:
    """Make sure that a folder is there.

    Raises:
        SecateurError: It is not, or this user may not look.
    """
    if os.path.isdir(folder):
        return
    try:
        os.stat(folder)
    except PermissionError as refused:
        raise error(
            f"{where}: expected a folder {folder}, got no permission to look. Name another."
        ) from refused
    except (OSError, ValueError):
        pass
    raise error(f"{where}: expected a folder {folder}, got none. Make it.")
