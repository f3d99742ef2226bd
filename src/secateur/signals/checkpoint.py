"""Save a scoring run to a file at intervals, so that a killed run can be resumed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from secateur.calibration.batch import IGNORED
from secateur.common.paths import require_folder
from secateur.common.reading import Count
from secateur.common.tensorfile import TensorFile
from secateur.errors import ArtefactError, SecateurError, SettingError
from secateur.signals.identity import difference
from secateur.signals.signal import Step, Vector
from secateur.signals.storage import Header, read, remove, write

_KIND = "scoring checkpoint"

Values = dict[str, dict[str, Vector]]
"""Finished scores: signal name to group name to scores."""


@dataclass
class Position:
    """How much of the data a process has read.

    Attributes:
        number: The pass over the data, from 0.
        read: Number of batches read in this pass.
        samples: Number of samples in the batches that this process scored.
        classes: The classes among them.
        digest: A checksum of their tensors; 0 without a checkpoint.
    """

    number: int = 0
    read: int = 0
    samples: int = 0
    classes: set[int] = field(default_factory=set)
    digest: int = 0

    def count(self, step: Step) -> None:
        """Count a batch that was scored."""
        self.read = step.index + 1
        self.samples += step.size
        if step.classes is not None:
            self.classes.update(set(step.classes.tolist()) - {IGNORED})


class _Position(BaseModel):
    """A `Position` in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: Count
    read: Count
    samples: Count
    classes: tuple[int, ...]
    digest: Count


class _Run(Header):
    """The header of a checkpoint. Tensors are ``state.<signal>.<name>`` and ``value.<signal>.<group>``."""

    about: dict[str, str]
    position: _Position
    states: tuple[str, ...]
    values: tuple[str, ...]

    def expected(self, file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Accept any state of a tally, and vectors of float64 as values."""
        found = {}
        for key, entry in file.entries.items():
            match = re.fullmatch(r"(state|value)\.(\d{1,6})\.(.+)", key, re.DOTALL)
            names = () if match is None else self.states if match[1] == "state" else self.values
            if match is None or int(match[2]) >= len(names):
                raise ValueError(f"a tensor {key[:80]!r}")
            is_value = match[1] == "value"
            found[key] = ("F64" if is_value else entry.dtype, tuple(entry.shape[: 1 if is_value else None]))
        return found


@dataclass
class Saved:
    """The content of a checkpoint: a position, the tallies' states there, and scores of earlier passes."""

    position: Position
    states: dict[str, dict[str, Tensor]]
    values: Values


class Checkpoint:
    """The checkpoint file of one process of one run."""

    def __init__(self, path: Path, every: float, about: Mapping[str, str]) -> None:
        """Prepare. Nothing is read or written yet.

        Args:
            path: The file. It is replaced at each write, and removed when the run is over.
            every: Seconds between two writes; 0 writes after every batch.
            about: From `secateur.signals.identity`.

        Raises:
            SettingError: `every` is negative, or the file's folder does not exist.
        """
        if every < 0:
            raise SettingError(
                f"checkpoint_every: expected seconds from 0, got {every}. Pass 60, for example."
            )
        require_folder(path.parent, "checkpoint", SettingError)
        self._path = path
        self._every = every
        self._about = dict(about)
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        """Return whether `every` seconds have passed since the last write."""
        return time.monotonic() - self._written >= self._every

    def load(self) -> Saved | None:
        """Read the file; None if there is none.

        Raises:
            ArtefactError: It is damaged, no checkpoint, or of another run. The message says what differs.
        """
        if not os.path.exists(self._path):
            return None
        header, tensors = read(self._path, _KIND, _Run)
        differs = difference(self._about, header.about)
        if differs is not None:
            raise ArtefactError(
                f"checkpoint {self._path}: expected one of this run, with {differs}. "
                "Name another file, or delete this one to start afresh."
            )
        states: dict[str, dict[str, Tensor]] = {name: {} for name in header.states}
        values: Values = {name: {} for name in header.values}
        for key, tensor in tensors.items():
            kind, index, name = key.split(".", 2)
            if kind == "state":
                states[header.states[int(index)]][name] = tensor
            else:
                values[header.values[int(index)]][name] = tensor.numpy()
        position = header.position.model_dump()
        return Saved(Position(**position | {"classes": set(position["classes"])}), states, values)

    @contextmanager
    def errors_from_content(self) -> Iterator[None]:
        """Turn errors inside the block, from states that do not fit the signals, into an ArtefactError."""
        try:
            yield
        except SecateurError:
            raise
        except Exception as error:  # a signal may fail in any way on the state of another one
            raise ArtefactError(
                f"checkpoint {self._path}: expected the states of these signals, got something else "
                f"({type(error).__name__}). Delete the file to start afresh."
            ) from error

    def save(self, now: Saved) -> None:
        """Replace the file."""
        tensors = {
            f"state.{index}.{name}": tensor
            for index, state in enumerate(now.states.values())
            for name, tensor in state.items()
        } | {
            f"value.{index}.{name}": torch.from_numpy(np.ascontiguousarray(vector))
            for index, by_group in enumerate(now.values.values())
            for name, vector in by_group.items()
        }
        header = _Run(
            about=self._about,
            position=_Position(**vars(now.position) | {"classes": tuple(sorted(now.position.classes))}),
            states=tuple(now.states),
            values=tuple(now.values),
        )
        write(self._path, _KIND, header, tensors)
        self._written = time.monotonic()

    def check_data(self, expected: Position, digest: int) -> None:
        """Raise ArtefactError unless the data that a resumed run skips are the data that were read before."""
        if digest != expected.digest:
            raise ArtefactError(
                f"checkpoint {self._path}: expected the {expected.read} batches that were read before, got "
                "others. Pass the same data in the same order, or delete the file to start afresh."
            )

    def remove(self) -> None:
        """Delete the file: the run is over."""
        remove(self._path)
