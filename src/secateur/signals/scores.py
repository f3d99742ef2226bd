"""`Scores`: what `sc.score` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.common.inert import inert_line
from secateur.common.paths import path_named
from secateur.common.reading import Count
from secateur.common.tensorfile import TensorFile
from secateur.errors import ScoreError
from secateur.graph.graph import Graph
from secateur.signals.storage import Header, read, write

_KIND = "scores"


class Table(Header):
    """What a file of scores says beside its vectors, which are called ``signal.group`` by number."""

    signals: tuple[str, ...]
    groups: tuple[str, ...]
    samples: Count
    classes: Count
    seed: int
    fingerprint: str

    def expected(self, file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        """One vector of float64 for each signal and group; those of one group are of one length."""
        for names in (self.signals, self.groups):
            if len(set(names)) != len(names):
                raise ValueError("a name twice")
        if len(self.signals) * len(self.groups) != len(file.entries):
            raise ValueError(
                f"{len(file.entries)} vectors of {len(self.signals)} signals and {len(self.groups)} groups"
            )
        first = [file.entries.get(f"0.{j}") for j in range(len(self.groups))]
        lengths = [() if entry is None else tuple(entry.shape[:1]) for entry in first]
        return {f"{i}.{j}": ("F64", n) for i in range(len(self.signals)) for j, n in enumerate(lengths)}


@dataclass(frozen=True, eq=False)
class Scores:
    """The score of each unit of each group, for every requested signal.

    Attributes:
        values: Signal name to group name to scores. float64 [group.size], read-only; higher is worth more.
        samples: Number of calibration samples that were read.
        classes: Number of classes among them; 0 if no signal read labels.
        seed: The seed they were made with.
        fingerprint: Of the model they belong to.

    Raises:
        ScoreError: Scores are not vectors of finite numbers, or signals cover different groups.

    Example:
        >>> scores = Scores({"magnitude": {"conv1": np.array([0.5, 1.5])}})
        >>> scores["magnitude"]["conv1"]
        array([0.5, 1.5])
    """

    values: Mapping[str, Mapping[str, NDArray[np.float64]]]
    samples: int = 0
    classes: int = 0
    seed: int = 0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Check the scores, and make them read-only."""
        groups: set[str] | None = None
        values: dict[str, Mapping[str, NDArray[np.float64]]] = {}
        for signal, by_group in self.values.items():
            if groups is not None and set(by_group) != groups:
                raise ScoreError(
                    f"signal {signal}: expected scores of the groups that other signals cover, got a "
                    f"difference in {sorted(set(by_group) ^ groups)}. Score every group with every signal."
                )
            groups = set(by_group)
            values[signal] = MappingProxyType({g: _vector(signal, g, v) for g, v in by_group.items()})
        object.__setattr__(self, "values", MappingProxyType(values))

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals, in the requested order."""
        return tuple(self.values)

    def __getitem__(self, signal: str) -> Mapping[str, NDArray[np.float64]]:
        """The scores of one signal, by group name."""
        if signal not in self.values:
            raise ScoreError(
                f"scores: expected one of {', '.join(self.values) or 'no signal'}, got {signal!r}. "
                f"Add it to the signals of sc.score."
            )
        return self.values[signal]

    def only(self, signals: Iterable[str]) -> Scores:
        """Return the scores of these signals alone."""
        return replace(self, values={name: self[name] for name in signals})

    def __contains__(self, signal: object) -> bool:
        """Whether there are scores of this signal."""
        return signal in self.values

    def __repr__(self) -> str:
        """A short text without the numbers."""
        groups = next(iter(self.values.values()), {})
        names = inert_line(", ".join(self.values))
        return f"Scores({names}: {len(groups)} groups, {self.samples} samples, seed {self.seed})"

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the table to one safetensors file, atomically: others can plan from it without the data.

        Args:
            path: The file; its folder must exist, a file there is replaced.

        Returns:
            The file.

        Raises:
            ArtefactError: The folder does not exist, or cannot be written to.
        """
        file = path_named("scores.save", path)
        write(file, _KIND, *self.parts())
        return file

    def parts(self) -> tuple[Table, dict[str, Tensor]]:
        """What a file of scores holds: all but the numbers, and these. `of_parts` is the inverse."""
        groups = next(iter(self.values.values()), {})
        header = Table(
            signals=tuple(self.values),
            groups=tuple(groups),
            samples=self.samples,
            classes=self.classes,
            seed=self.seed,
            fingerprint=self.fingerprint,
        )
        tensors = {
            f"{i}.{j}": torch.from_numpy(np.array(by_group[group]))
            for i, by_group in enumerate(self.values.values())
            for j, group in enumerate(groups)
        }
        return header, tensors

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read a table that `save` wrote, bit for bit. Nothing in the file is executed.

        Raises:
            ArtefactError: The file is missing, damaged, foreign, or newer than this version can read.
        """
        return cls.of_parts(*read(path_named(_KIND, path), _KIND, Table))

    @classmethod
    def of_parts(cls, header: Table, tensors: Mapping[str, Tensor]) -> Scores:
        """The scores of which these are the parts. The tensors are those that the header expects."""
        values = {
            signal: {group: tensors[f"{i}.{j}"].numpy() for j, group in enumerate(header.groups)}
            for i, signal in enumerate(header.signals)
        }
        return cls(values, header.samples, header.classes, header.seed, header.fingerprint)

    def check(self, graph: Graph) -> None:
        """Raise ScoreError unless these are scores of every group of `graph`."""
        if self.fingerprint and self.fingerprint != graph.fingerprint:
            raise ScoreError(
                f"scores: expected scores of model {graph.fingerprint[:12]}, got {self.fingerprint[:12]}. "
                "Score the model that is to be pruned."
            )
        sizes = {group.name: group.size for group in graph.groups}
        for signal, by_group in self.values.items():
            got = {name: len(vector) for name, vector in by_group.items()}
            if got != sizes:
                wrong = sorted(n for n in sizes.keys() | got.keys() if sizes.get(n) != got.get(n))
                raise ScoreError(
                    f"signal {signal}, group {wrong[0]}: expected {sizes.get(wrong[0], 'no')} scores, got "
                    f"{got.get(wrong[0], 'none')}. Return one score per unit of every group."
                )


def _vector(signal: str, group: str, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    vector = np.array(scores, dtype=np.float64)  # a copy: the result is read-only, the caller's array is not
    where = f"signal {signal}, group {group}"
    if vector.ndim != 1:
        raise ScoreError(
            f"{where}: expected one score per unit, got shape {list(vector.shape)}. Return a vector."
        )
    bad = np.flatnonzero(~np.isfinite(vector))
    if len(bad):
        raise ScoreError(
            f"{where}: expected finite scores, got {vector[bad[0]]} for unit {bad[0]}. "
            "Check the model's weights and the data for NaN and overflow."
        )
    vector.setflags(write=False)
    return vector
