"""Keep what a long run has finished in a folder, so that a killed run goes on where it was.

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

from secateur.artefact.writing import PREFIX, explained, locked_file
from secateur.calibration import Calibration
from secateur.common.models import named_tensors
from secateur.common.paths import entries, path_named
from secateur.common.reading import complaint, parse_json
from secateur.common.tensorfile import TensorFile
from secateur.errors import ArtefactError
from secateur.signals.distributed import joined
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
    """Which run a folder belongs to, by what each thing is called."""

    about: dict[str, str]

    def expected(self, file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        """No tensors."""
        return {}


class _Finished(Header):
    """What a step says beside its tensors, which may be any.

    Attributes:
        step: The step's name.
        notes: What it found, as JSON.
    """

    step: str
    notes: str

    def expected(self, file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that are there."""
        return {name: (entry.dtype, tuple(entry.shape)) for name, entry in file.entries.items()}


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a run.

    Attributes:
        journal: The run.
        name: The name of its file.
    """

    journal: Journal
    name: str
    _within: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Its file."""
        return self.journal.folder / self.name

    def load(self, take: Callable[[Any, dict[str, Tensor]], T]) -> T | None:
        """What the step found; None if it is not finished.

        With several processes the first one reads, and all get the same.

        Args:
            take: Makes the result of the notes and the tensors that were saved; any error of Python's own
                says that they are not what this step saves.

        Raises:
            ArtefactError: The file is damaged, or of another step.
        """
        self.journal.note(self.name)
        with joined(_HOST) as team:
            kept, found = None, None
            with team.together():
                if team.rank == 0 and os.path.exists(self.path):
                    advice = "Delete the file to compute it again."
                    header, tensors = _read(self.path, _STEP_KIND, _Finished, advice)
                    kept = header.step, header.notes, tensors
                    found = self._taken(take, *kept)
            if team.size > 1 and (kept := team.from_first(kept)) is not None and team.rank > 0:
                found = self._taken(take, *kept)
            return found

    def _taken(
        self, take: Callable[[Any, dict[str, Tensor]], T], name: str, notes: str, tensors: dict[str, Tensor]
    ) -> T:
        try:
            if name != self.name:
                raise ValueError(f"step {name[:60]}")
            return take(parse_json(notes, constants=True), tensors)
        except Exception as error:  # somebody else's notes may go wrong in any way
            raise ArtefactError(
                f"{self.path}: expected step {self.name}, got something else ({str(error)[:200]}). Delete "
                "the file to compute it again."
            ) from error

    def save(self, notes: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep what the step found, as JSON and as tensors. What was kept `inside` is deleted."""
        self.journal.note(self.name)
        with joined(_HOST) as team, team.together():
            if team.rank == 0:
                header = _Finished(step=self.name, notes=json.dumps(notes))
                on_cpu = {name: tensor.detach().cpu() for name, tensor in (tensors or {}).items()}
                write(self.path, _STEP_KIND, header, on_cpu)
                for name in self._within:
                    (self.journal.folder / name).unlink(missing_ok=True)
        self._within.clear()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Steps of the block are part of this one: they are deleted when it is saved."""
        self.journal.open.append(self._within)
        try:
            yield
        finally:
            self.journal.open.pop()


@dataclass(frozen=True, eq=False)
class Journal:
    """The steps of one run.

    Attributes:
        folder: Where they are kept.
        open: The steps that are being computed: of each, the names of those inside.
    """

    folder: Path
    open: list[list[str]] = field(default_factory=list)
    _known: dict[int, tuple[object, str]] = field(default_factory=dict)

    def step(self, what: str, *parts: str) -> Step:
        """The step of this kind, a word of small letters, whose result depends on these texts alone."""
        return Step(self, f"{what}-{text_digest(*parts)}")

    def note(self, name: str) -> None:
        """Note that a step is inside the one that is being computed."""
        if self.open:
            self.open[-1].append(name)

    def dense(self, tensors: Mapping[str, Any]) -> str:
        """A digest of tensors that do not change during the run. It is computed once."""
        return self._once(tensors, lambda: digest_of(tensors))

    def data(self, data: Calibration) -> str:
        """A text that identifies calibration data."""
        return self._once(data, lambda: of_data(data))

    def _once(self, value: object, make: Callable[[], str]) -> str:
        if id(value) not in self._known:
            self._known[id(value)] = value, make()
        return self._known[id(value)][1]


def checked_notes(model: type[M], notes: Any) -> M:
    """Notes of a step as a strict model of their fields.

    Raises:
        ValueError: They are not what the model says.
    """
    try:
        return model.model_validate_json(json.dumps(notes))
    except ValidationError as error:
        raise ValueError(complaint(error)) from error


def require_like(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that were kept, each of which has to have the shape and dtype of that of its name.

    Raises:
        ValueError: One has not.
    """
    for name, tensor in found.items():
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(f"{name[:80]} {list(tensor.shape)} of {tensor.dtype}")
    return dict(found)


def model_digest(model: nn.Module) -> str:
    """A digest of all tensors of a model."""
    return digest_of(named_tensors(model))


def plan_digest(plan: Any) -> str:
    """A digest of what a plan removes. Masks of single weights are not in its JSON."""
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


def current() -> Journal | None:
    """The journal of the run that is going on; None if it keeps none."""
    return _current.get()


@contextmanager
def keeping(folder: str | PathLike[str] | None, about: Callable[[], dict[str, str]]) -> Iterator[None]:
    """Keep the steps of the block in a folder; those that are there already are not computed again.

    Args:
        folder: The folder; made if there is none. None: nothing is kept.
        about: Returns what the run depends on, as `secateur.signals.identity.of_run` does.

    Raises:
        ArtefactError: The folder belongs to another run, holds other files, is in use, or cannot be written
            to.
    """
    if folder is None:
        yield
        return
    path = path_named("checkpoint", folder)
    with ExitStack() as stack:
        with joined(_HOST) as team, team.together():
            with explained(path, ArtefactError):
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
    """Check that a folder is empty or belongs to this run; mark it as this run's."""
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
    """Read a file of a checkpoint, and say what to do if it is damaged."""
    try:
        return read(path, kind, header)
    except ArtefactError as error:
        said = str(error)
        for other in (" Make the file again.", " Check the path.", " Name another file."):
            said = said.removesuffix(other)
        raise ArtefactError(f"{said} {advice}") from error


def discard(folder: str | PathLike[str]) -> None:
    """Delete the steps of a run that is over, and the folder if nothing else is in it.

    If another run has begun to work in it, it stays.
    """
    path = path_named("checkpoint", folder)
    if not os.path.exists(path / RUN):
        return
    with explained(path, ArtefactError), locked_file(path / RUN) as mine:
        if not mine:
            return
        # The newest first: a step goes before those that it needs, so what a kill leaves can be gone on from.
        there = {entry.name: entry.stat().st_mtime_ns for entry in entries(path, "checkpoint")}
        for name in sorted(filter(_STEP.fullmatch, there), key=lambda n: (there[n], n), reverse=True):
            (path / name).unlink()
        remove(path / RUN)
        if not any(path.iterdir()):
            path.rmdir()
