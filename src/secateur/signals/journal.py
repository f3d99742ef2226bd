"""Keep the finished steps of a long run in a folder, so that a killed run can be continued.

Each finished step is a file. It is named after a digest of all that its result depends on: the tensors of the
models, the data and the settings. So a run that is started again reads what it finished before, computes the
rest, and no result is taken for another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from secateur.artefact.writing import PREFIX, locked_file, os_errors_as
from secateur.calibration import Calibration
from secateur.common.models import named_tensors
from secateur.common.paths import entries, path_named
from secateur.common.reading import complaint, parse_json
from secateur.common.tensorfile import TensorFile
from secateur.errors import ArtefactError
from secateur.signals.distributed import team_of_processes
from secateur.signals.identity import difference, digest_of, of_data
from secateur.signals.storage import H, Header, read, remove, write

RUN = "run.safetensors"
"""The file that says which run a folder belongs to."""

_STEP = re.compile(r"[a-z]+-[0-9a-f]{40}(\.\d+of\d+)?")
_RUN_KIND, _STEP_KIND = "notes of a run", "finished steps"
_HOST = torch.device("cpu")

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class _Run(Header):
    """The run that a folder belongs to: what it depends on, by name."""

    about: dict[str, str]

    def expected(self, file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return nothing: this file holds no tensors."""
        return {}


class _Finished(Header):
    """The header of a finished step's file. The file may hold any tensors.

    Attributes:
        step: The step's name.
        notes: The step's result without tensors, as JSON.
    """

    step: str
    notes: str

    def expected(self, file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Accept the tensors that are there."""
        return {name: (entry.dtype, tuple(entry.shape)) for name, entry in file.entries.items()}


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a run.

    Attributes:
        journal: The journal of the run.
        name: The name of the step's file.
    """

    journal: Journal
    name: str
    _within: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The step's file."""
        return self.journal.folder / self.name

    def load(self, make: Callable[[Any, dict[str, Tensor]], T]) -> T | None:
        """Return the step's result; None if it is not finished.

        With several processes, the first one reads the file, and all get the same result.

        Args:
            make: Makes the result from the saved notes and tensors. Any error that it raises means that
                another step saved them.

        Raises:
            ArtefactError: The file is damaged, or of another step.
        """
        self.journal.note(self.name)
        with team_of_processes(_HOST) as team:
            kept = None
            with team.together():
                if team.rank == 0 and os.path.exists(self.path):
                    advice = "Delete the file to compute it again."
                    header, tensors = _read(self.path, _STEP_KIND, _Finished, advice)
                    kept = header.step, header.notes, tensors
            kept = team.from_first(kept)
            with team.together():  # after the others have the file: `make` may use all processes
                return None if kept is None else self._result(make, *kept)

    def _result(
        self, make: Callable[[Any, dict[str, Tensor]], T], name: str, notes: str, tensors: dict[str, Tensor]
    ) -> T:
        try:
            if name != self.name:
                raise ValueError(f"step {name[:60]}")
            return make(parse_json(notes, constants=True), tensors)
        except Exception as error:  # somebody else's notes may go wrong in any way
            raise ArtefactError(
                f"{self.path}: expected step {self.name}, got something else ({str(error)[:200]}). Delete "
                "the file to compute it again."
            ) from error

    def save(self, notes: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the step's result, as JSON and as tensors. Steps that were kept `inside` are deleted."""
        self.journal.note(self.name)
        with team_of_processes(_HOST) as team, team.together():
            if team.rank == 0:
                header = _Finished(step=self.name, notes=json.dumps(notes))
                on_cpu = {name: tensor.detach().cpu() for name, tensor in (tensors or {}).items()}
                write(self.path, _STEP_KIND, header, on_cpu)
                for name in self._within:
                    (self.journal.folder / name).unlink(missing_ok=True)
        self._within.clear()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Steps inside the block are parts of this step. They are deleted when it is saved."""
        self.journal.open.append(self._within)
        try:
            yield
        finally:
            self.journal.open.pop()


@dataclass(frozen=True, eq=False)
class Journal:
    """The steps of one run.

    Attributes:
        folder: The folder of their files.
        open: For each step that is being computed, the names of the steps inside it.
    """

    folder: Path
    open: list[list[str]] = field(default_factory=list)
    _known: dict[int, tuple[object, str]] = field(default_factory=dict)

    def step(self, what: str, *parts: str) -> Step:
        """Return a step.

        Args:
            what: The kind of step, a word in lower case.
            parts: Texts that determine the result: all that it depends on.
        """
        return Step(self, f"{what}-{text_digest(*parts)}")

    def note(self, name: str) -> None:
        """Add a step to those inside the step that is being computed."""
        if self.open:
            self.open[-1].append(name)

    def dense(self, tensors: Mapping[str, Any]) -> str:
        """Return a digest of tensors that do not change during the run. It is computed only once."""
        return self._once(tensors, lambda: digest_of(tensors))

    def data(self, data: Calibration) -> str:
        """Return a text that identifies calibration data. It is made only once."""
        return self._once(data, lambda: of_data(data))

    def _once(self, value: object, make: Callable[[], str]) -> str:
        if id(value) not in self._known:
            self._known[id(value)] = value, make()
        return self._known[id(value)][1]


def checked_notes(model: type[M], notes: Any) -> M:
    """Return the notes of a step as a pydantic model, checked strictly.

    Raises:
        ValueError: They do not fit the model.
    """
    try:
        return model.model_validate_json(json.dumps(notes))
    except ValidationError as error:
        raise ValueError(complaint(error)) from error


def require_like(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the saved tensors, after a check of shapes and dtypes.

    Args:
        found: The saved tensors.
        expected: A tensor of the right shape and dtype for each name.

    Raises:
        ValueError: A tensor has another shape or dtype.
    """
    for name, tensor in found.items():
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(f"{name[:80]} {list(tensor.shape)} of {tensor.dtype}")
    return dict(found)


def model_digest(model: nn.Module) -> str:
    """Return a digest of all tensors of a model."""
    return digest_of(named_tensors(model))


def plan_digest(plan: Any) -> str:
    """Return a text that identifies a plan: its JSON, and a digest of masks, which the JSON lacks."""
    masks = getattr(plan, "masks", {})
    text: str = plan.to_json()
    return text + digest_of({name: torch.from_numpy(np.packbits(mask)) for name, mask in masks.items()})


def text_digest(*parts: str) -> str:
    """Hash texts. [hex]"""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{len(part)}:{part}".encode())
    return found.hexdigest()[:40]


_current: ContextVar[Journal | None] = ContextVar("journal", default=None)


def current_journal() -> Journal | None:
    """Return the journal of the current run; None if it has none."""
    return _current.get()


@contextmanager
def journal_in(folder: str | PathLike[str] | None, about: Callable[[], dict[str, str]]) -> Iterator[None]:
    """Keep the steps inside the block in a folder. Steps that it holds already are not computed again.

    Args:
        folder: The folder. It is made if it does not exist. None: nothing is kept.
        about: Returns what the run depends on, by name, as `secateur.signals.identity.of_run` does.

    Raises:
        ArtefactError: The folder belongs to another run, holds other files, is in use, or is read-only.
    """
    if folder is None:
        yield
        return
    path = path_named("checkpoint", folder)
    with ExitStack() as stack:
        with team_of_processes(_HOST) as team, team.together():
            with os_errors_as(path, ArtefactError):
                path.mkdir(parents=True, exist_ok=True)
            if team.rank == 0:
                _check(path, about())
                if not stack.enter_context(locked_file(path / RUN)):
                    raise ArtefactError(
                        f"checkpoint {path}: expected a folder that no run is using, got one that another "
                        "run works in. Wait until it ends, or name another folder."
                    )
        token = _current.set(Journal(path))
        try:
            yield
        finally:
            _current.reset(token)


def _check(folder: Path, about: dict[str, str]) -> None:
    """Check that a folder is empty or belongs to this run. Mark an empty one as this run's."""
    if os.path.exists(folder / RUN):
        advice = "Delete the folder to start afresh, or name another."
        header, _ = _read(folder / RUN, _RUN_KIND, _Run, advice)
        differs = difference(about, header.about)
        if differs is not None:
            raise ArtefactError(
                f"checkpoint {folder}: expected one of this run, with {differs}. Name another folder, or "
                "delete this one to start afresh."
            )
        return
    others = [entry.name for entry in entries(folder, "checkpoint") if not entry.name.startswith(PREFIX)]
    if others:
        raise ArtefactError(
            f"checkpoint {folder}: expected a new or empty folder, or one that an earlier run of the same "
            f"command has left, got {others[0][:80]!r} in it. Name another folder."
        )
    write(folder / RUN, _RUN_KIND, _Run(about=about), {})


def _read(path: Path, kind: str, header: type[H], advice: str) -> tuple[H, dict[str, Tensor]]:
    """Read a file of a checkpoint. If it is damaged, the error ends with `advice`."""
    try:
        return read(path, kind, header)
    except ArtefactError as error:
        message = str(error)
        for other in (" Make the file again.", " Check the path.", " Name another file."):
            message = message.removesuffix(other)
        raise ArtefactError(f"{message} {advice}") from error


def discard(folder: str | PathLike[str]) -> None:
    """Delete the steps of a finished run, and the folder if nothing else is in it.

    Nothing is deleted if another run uses the folder.
    """
    path = path_named("checkpoint", folder)
    if not os.path.exists(path / RUN):
        return
    with os_errors_as(path, ArtefactError), locked_file(path / RUN) as mine:
        if not mine:
            return
        # The newest first: a step is deleted before those that it needs, so a run can continue after a kill.
        there = {entry.name: entry.stat().st_mtime_ns for entry in entries(path, "checkpoint")}
        for name in sorted(filter(_STEP.fullmatch, there), key=lambda n: (there[n], n), reverse=True):
            (path / name).unlink()
        remove(path / RUN)
        if not any(path.iterdir()):
            path.rmdir()
