"""A plan for single weights: one mask for each weight tensor, with how it was decided."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.common.inert import inert_line
from secateur.common.paths import path_named
from secateur.common.reading import Count
from secateur.common.tensorfile import TensorFile
from secateur.errors import PlanError
from secateur.signals.storage import Header, read, write

if TYPE_CHECKING:
    from secateur.targets.weights.weights import Weights

_KIND = "masks"


class _Masks(Header):
    """What a file of masks says beside their bits, which are called by the masks' numbers."""

    fingerprint: str
    allocator: str
    settings: dict[str, JsonValue]
    seed: int
    budget: dict[str, JsonValue] | None
    certificates: dict[str, JsonValue]
    parameters: Count = 0
    alone: dict[str, Count] = {}  # noqa: RUF012 pydantic copies it
    shapes: dict[str, tuple[Count, ...]]

    def expected(self, file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        """One bit for each weight, in whole bytes."""
        if any(len(shape) > 32 for shape in self.shapes.values()):
            raise ValueError("a mask of more than 32 axes")
        return {str(k): ("U8", (-(-math.prod(shape) // 8),)) for k, shape in enumerate(self.shapes.values())}


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """Which single weights of a model stay and which are set to zero.

    Attributes:
        fingerprint: Fingerprint of the model that the masks were made for.
        allocator: Name of the allocator that made the masks.
        masks: Boolean mask for each weight, by its name in the state dict. It has the weight's shape and is
            read-only. True: the weight stays.
        settings: The allocator's settings, and the value of its knob.
        seed: The seed of the run.
        budget: The budget; None if there was none.
        certificates: What the allocator guarantees or predicts.
        parameters: Number of parameters of the whole model; 0 if unknown.
        alone: Number of parameters of each other layer with weights, by a name such as ``rnn (LSTM)``. No
            mask covers these layers.

    Raises:
        PlanError: A mask is not boolean, or a setting is not JSON.
    """

    granularity: ClassVar[Literal["weight"]] = "weight"

    fingerprint: str
    allocator: str
    masks: Mapping[str, NDArray[np.bool_]] = field(repr=False)
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    seed: int = 0
    budget: Mapping[str, JsonValue] | None = None
    certificates: Mapping[str, JsonValue] = field(default_factory=dict, repr=False)
    parameters: int = 0
    alone: Mapping[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Checks the masks, and makes them read-only."""
        masks: dict[str, NDArray[np.bool_]] = {}
        for name, mask in self.masks.items():
            found = np.array(mask)
            if found.dtype != np.bool_:
                raise PlanError(
                    f"masks: expected a boolean mask of {name!r}, got {found.dtype}. "
                    "Pass True for what stays."
                )
            found.setflags(write=False)
            masks[name] = found
        object.__setattr__(self, "masks", MappingProxyType(masks))
        try:
            self.to_json()
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"masks: expected settings that JSON can hold, got {error}. Correct them."
            ) from error

    @classmethod
    def build(
        cls,
        graph: Weights,
        keep: Mapping[str, NDArray[np.bool_]],
        *,
        allocator: str,
        settings: Mapping[str, JsonValue] | None = None,
        seed: int = 0,
        budget: Mapping[str, JsonValue] | None = None,
        certificates: Mapping[str, JsonValue] | None = None,
    ) -> MaskPlan:
        """Make a plan of a decision, as `Plan.build` does for units.

        Args:
            graph: The maskable weights.
            keep: Vectors by weight name, True for weights that stay. [group.size]
            allocator: Name of the rule that decided.
            settings: The rule's settings.
            seed: The seed of the run.
            budget: The budget that was asked for.
            certificates: What the rule guarantees or predicts.
        """
        shapes = {group.name: group.shape for group in graph.groups}
        return cls(
            graph.fingerprint,
            allocator,
            {name: mask.reshape(shapes[name]) for name, mask in keep.items()},
            settings or {},
            seed,
            budget,
            certificates or {},
            graph.parameters,
            graph.alone,
        )

    @property
    def keep(self) -> dict[str, NDArray[np.bool_]]:
        """The masks as vectors, by weight name. True stays. [weight.numel()]"""
        return {name: mask.reshape(-1) for name, mask in self.masks.items()}

    @property
    def sparsities(self) -> dict[str, float]:
        """The removed fraction of each weight tensor, in [0, 1]."""
        return {name: 1 - float(mask.mean()) if mask.size else 0.0 for name, mask in self.masks.items()}

    @property
    def removed(self) -> int:
        """Number of removed weights in all tensors together."""
        return sum(int((~mask).sum()) for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        """The removed fraction of all masked tensors together, in [0, 1]."""
        size = sum(mask.size for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / size if size else 0.0

    def sentence(self) -> str:
        """One sentence for people: the share of zeros, and the largest layers that have no mask."""
        text = f"{self.sparsity:.2%} of the weights of linear layers and convolutions are zero"
        if self.parameters:
            text += f", {self.removed / self.parameters:.2%} of all parameters"
        return f"{text}; {untouched}" if (untouched := self._untouched()) else text

    def _untouched(self, most: int = 3) -> str:
        names = sorted(self.alone, key=lambda name: -self.alone[name])
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return f"left alone: {', '.join(names[:most])}{more}" if names else ""

    def to_json(self) -> str:
        """The plan as JSON, with counts of kept weights instead of masks. Equal plans give equal text."""
        tensors = [
            {"name": name, "shape": list(mask.shape), "kept": int(mask.sum())}
            for name, mask in self.masks.items()
        ]
        return (
            json.dumps(self._header() | {"tensors": tensors}, sort_keys=True, allow_nan=False, indent=1)
            + "\n"
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the plan to one safetensors file, atomically: one bit for each weight, the rest as JSON.

        Args:
            path: The file to write. Its folder must exist. An existing file is replaced.

        Returns:
            The path of the file.

        Raises:
            ArtefactError: The folder does not exist, or cannot be written to.
        """
        file = path_named("masks.save", path)
        header = _Masks(**self._header(), shapes={name: mask.shape for name, mask in self.masks.items()})
        packed = {
            str(k): torch.from_numpy(np.packbits(mask.reshape(-1)))
            for k, mask in enumerate(self.masks.values())
        }
        write(file, _KIND, header, packed)
        return file

    @classmethod
    def load(cls, path: str | PathLike[str]) -> MaskPlan:
        """Read a plan that `save` wrote. No code from the file is executed.

        Raises:
            ArtefactError: The file is missing, damaged, no plan of masks, or written by a newer version.
        """
        header, tensors = read(path_named(_KIND, path), _KIND, _Masks)
        masks = {}
        for k, (name, shape) in enumerate(header.shapes.items()):
            bits = np.unpackbits(tensors[str(k)].numpy(), count=math.prod(shape))
            masks[name] = bits.astype(np.bool_).reshape(shape)
        return cls(masks=masks, **header.model_dump(exclude={"shapes"}))

    def _header(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "allocator": self.allocator,
            "settings": dict(self.settings),
            "seed": self.seed,
            "budget": None if self.budget is None else dict(self.budget),
            "certificates": dict(self.certificates),
            "parameters": self.parameters,
            "alone": dict(self.alone),
        }

    def __str__(self) -> str:
        """A table: kept and removed weights of each tensor, of all tensors, and of the whole model."""
        rows = [("weight", "kept", "total", "removed")]
        rows += [
            (name, f"{int(mask.sum()):,}", f"{mask.size:,}", f"{self.sparsities[name]:.1%}")
            for name, mask in self.masks.items()
        ]
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        size = sum(mask.size for mask in self.masks.values())
        rows.append(("all of these", f"{kept:,}", f"{size:,}", f"{self.sparsity:.1%}"))
        if (total := self.parameters) > 0:
            left, share = total - self.removed, self.removed / total
            rows.append(("all parameters", f"{left:,}", f"{total:,}", f"{share:.1%}"))
        width = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{a:<{width[0]}}  {b:>{width[1]}} / {c:>{width[2]}}  {d:>{width[3]}}" for a, b, c, d in rows
        ]
        head, rule, last = (
            f"masks by {self.allocator}, seed {self.seed}",
            "-" * len(lines[0]),
            len(self.masks) + 1,
        )
        table = [head, "", lines[0], rule, *lines[1:last], rule, *lines[last:], self._untouched()]
        return "\n".join(map(inert_line, table)).rstrip()
