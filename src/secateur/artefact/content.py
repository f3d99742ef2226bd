"""What an artefact's record says, and how record and tensors are read: together, checked, from open files."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from secateur.artefact.pair import LARGEST_RECORD, RECORD, TENSORS, hidden_name
from secateur.artefact.unsaved import Sample
from secateur.common.reading import complaint, opened, parse_json, read_bytes
from secateur.common.tensorfile import TensorFile, checksum
from secateur.errors import ArtefactError
from secateur.targets.units.record import Form

FORMAT = 1
_TRIALS = 50
"""How often a reader looks again where a save replaces the files meanwhile."""


class Flag(BaseModel):
    """A flag that has to keep a known value (`secateur.targets.units.later_calls.flagged.Refused`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    chain: tuple[str, ...]
    known: tuple[str, ...]
    line: str


class Content(BaseModel):
    """The content of ``secateur.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int
    secateur: str
    torch: str
    form: Form
    note: str
    repairs: tuple[dict[str, JsonValue], ...]
    sizes: dict[str, bool | int | float | list[bool | int | float | str | None]]
    captured: tuple[str, ...]
    takes: str = ""
    stand_ins: dict[str, list[int | str]] = {}
    flags: tuple[Flag, ...] = ()
    numbers: dict[str, bool | int | float | list[bool | int | float | str | None]] = {}
    tied: dict[str, str]
    extra_state: dict[str, JsonValue] = {}
    unsaved: dict[str, Sample] = {}
    tensors_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    plan: dict[str, JsonValue]
    record_sha256: str


@contextmanager
def opened_artefact(folder: Path, at_most: int | None = None) -> Iterator[tuple[Content, TensorFile]]:
    """Open the record and the tensors that it names. If a save replaces both meanwhile, either pair is found.

    Args:
        folder: The artefact.
        at_most: Bytes that the tensors may have. A larger file is refused before it is read.

    Raises:
        ArtefactError: A file is missing, damaged, altered, foreign, newer or too large.
    """
    if not os.path.isdir(folder):
        raise ArtefactError(
            f"load({folder}): expected a folder with {TENSORS} and {RECORD}, got none. Check the path."
        )
    for trial in range(_TRIALS):
        written = _record(folder)
        content = _checked(folder, written)
        seen: os.stat_result | None = None
        for name in (TENSORS, hidden_name(content.tensors_sha256)):
            with _opened_if_there(folder / name, folder) as file:
                if file is None:
                    continue
                seen = seen or os.fstat(file.fileno())
                size = os.fstat(file.fileno()).st_size
                if at_most is not None and size > at_most:
                    raise ArtefactError(
                        f"load({folder}): expected {TENSORS} of at most {at_most:,} bytes for the model that "
                        f"make_model() makes, got {size:,}. Pass the function that made the model that was "
                        "pruned."
                    )
                if (tensors := _named(file, folder, content)) is not None:
                    yield content, tensors
                    return
        if not _replaced(folder, written, content, seen):
            if seen is None:
                raise ArtefactError(
                    f"load({folder}): expected a folder with {TENSORS} and {RECORD}, got no {TENSORS}. Check "
                    "the path."
                )
            raise _damaged(
                folder,
                f"{TENSORS} is truncated, altered or from another save: its checksum does not fit {RECORD}",
            )
        time.sleep(0.001 * trial)
    raise _damaged(folder, f"the files of {folder.name} are replaced again and again")


def _named(file: BinaryIO, folder: Path, content: Content) -> TensorFile | None:
    """Return the tensors in a file if they are those that the record names; else None."""
    try:
        found = TensorFile(file, f"load({folder}): {TENSORS}", ArtefactError)
    except ArtefactError:  # this check is cheaper than the checksum
        return None
    return found if checksum(file) == content.tensors_sha256 else None


def _replaced(folder: Path, record: bytes, content: Content, tensors: os.stat_result | None) -> bool:
    """Whether the files have been replaced since they were read.

    The order matters. A save that comes back to the same record may be under way: its tensors lie under the
    hidden name before the record is there, and get their usual name after it.
    """
    if _record(folder) != record or os.path.lexists(folder / hidden_name(content.tensors_sha256)):
        return True
    try:
        now = os.stat(folder / TENSORS)
    except OSError:
        return tensors is not None
    return tensors is None or (now.st_ino, now.st_mtime_ns) != (tensors.st_ino, tensors.st_mtime_ns)


@contextmanager
def _opened_if_there(path: Path, folder: Path) -> Iterator[BinaryIO | None]:
    with ExitStack() as stack:
        file = None
        try:
            file = stack.enter_context(opened(path, f"load({folder})", ArtefactError, TENSORS))
        except ArtefactError as error:  # a save may have moved it just now
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        yield file


def _damaged(folder: Path, why: str) -> ArtefactError:
    return ArtefactError(f"load({folder}): {why}. Save the model again.")


def _record(folder: Path) -> bytes:
    return read_bytes(folder / RECORD, LARGEST_RECORD, f"load({folder})", ArtefactError, RECORD)


def _checked(folder: Path, written: bytes) -> Content:
    try:
        content = parse_json(written, constants=True)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{RECORD} is no JSON ({error})") from error
    if (
        not isinstance(content, dict)
        or type(content.get("format")) is not int
        or not isinstance(content.get("secateur"), str)
    ):
        raise _damaged(folder, f"{RECORD} is not secateur's: expected a mapping with 'format' and 'secateur'")
    if content["format"] > FORMAT:
        raise ArtefactError(
            f"load({folder}): expected format {FORMAT} or older, got {content['format']}, written by "
            f"secateur {content['secateur'][:40]}. Upgrade secateur."
        )
    if content.pop("record_sha256", None) != digest(content):
        raise _damaged(folder, f"{RECORD} was altered: its checksum does not fit its content")
    try:
        return Content.model_validate_json(written)
    except ValidationError as error:
        raise _damaged(folder, f"{RECORD} is malformed: {complaint(error)}") from error


def digest(content: dict[str, Any]) -> str:
    """Return the checksum of a record without its own checksum."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
