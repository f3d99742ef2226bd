"""The description of one argument of a call, from which a similar one can be drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from secateur.common.reading import Count
from secateur.errors import SettingError

Place = tuple[str, int]
"""An axis of an input: the input's name and the number of the axis."""

Range = tuple[int | float, int | float]
"""The smallest and the largest value of a tensor."""


class Record(BaseModel):
    """Base of plain data that never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Leaf(Record):
    """One argument: a tensor's shape, dtype and range of values, a constant, or a container of these.

    Attributes:
        kind: What it is.
        shape: The shape of a tensor.
        dtype: The dtype of a tensor, without ``torch.``.
        low: The smallest value to draw. None for a tensor that is drawn as normal noise. These are tensors of
            floats, unless no value is negative, or the model refuses noise or gives NaN for it.
        high: The largest value to draw.
        kept: For a mask of padding, the value of the positions that count; None for all other tensors.
        value: The value of a constant.
        items: The entries of a container.
        keys: The keys of a mapping.
    """

    kind: Literal["tensor", "constant", "list", "tuple", "dict"]
    shape: tuple[Count, ...] = ()
    dtype: str = ""
    low: int | float | None = None
    high: int | float | None = None
    kept: int | None = None
    value: bool | int | float | str | None = None
    items: tuple[Leaf, ...] = ()
    keys: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Leaf:
        if self.kind == "tensor" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"expected a dtype of torch, got {self.dtype[:40]!r}")
        if self.kept not in (None, 0, 1):
            raise ValueError(f"expected a mask of zeros and ones, got {self.kept}")
        if self.low is not None and self.high is not None and not self.low <= self.high < 2**63:
            raise ValueError(f"expected values from {self.low} up, got at most {self.high}")
        if self.kind == "dict" and len(set(self.keys)) != len(self.items):
            raise ValueError(f"expected a key for each of {len(self.items)} entries, got {len(self.keys)}")
        if self.keys and len(self.keys) != len(self.items):
            raise ValueError(f"expected a key for each of {len(self.items)} entries, got {len(self.keys)}")
        return self

    @classmethod
    def of(cls, value: Any, name: str = "") -> Leaf:
        """Describe a value.

        Raises:
            SettingError: A plan cannot save a value of this type.
        """
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_nested:
                got = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
                raise SettingError(
                    f"example inputs: expected dense tensors, got {got}{f' as {name}' if name else ''}. Wrap "
                    f"the model in a module that takes dense tensors (indices and values, or padded rows and "
                    f"a mask) and builds the other tensor from them."
                )
            low, high = _range(value)
            dtype = str(value.dtype).removeprefix("torch.")
            kept = _kept(value, name)
            return cls(kind="tensor", shape=tuple(value.shape), dtype=dtype, low=low, high=high, kept=kept)
        if value is None or isinstance(value, bool | int | float | str):
            return cls(kind="constant", value=value)
        if isinstance(value, list | tuple):
            kind: Literal["list", "tuple"] = "list" if isinstance(value, list) else "tuple"
            return cls(kind=kind, items=tuple(cls.of(v, name) for v in value))
        if isinstance(value, Mapping):
            items = tuple(cls.of(v, str(k)) for k, v in value.items())
            return cls(kind="dict", keys=tuple(map(str, value)), items=items)
        raise SettingError(
            f"example inputs: expected tensors, numbers, strings, lists, tuples and mappings, got "
            f"{type(value).__name__}. Pass the model plain tensors, or wrap it in a module that does."
        )

    def tensors(self, name: str) -> Iterator[tuple[str, Leaf]]:
        """Yield the tensors in this argument, each with its name: ``x``, ``x.0``, ``x.mask``."""
        if self.kind == "tensor":
            yield name, self
        for key, item in zip(self.keys or map(str, range(len(self.items))), self.items, strict=True):
            yield from item.tensors(f"{name}.{key}")

    def with_ranges(self, name: str, ranges: Mapping[str, Range]) -> Leaf:
        """Return the same argument with the given ranges of values for the tensors in `ranges`."""
        if self.kind == "tensor":
            low, high = ranges.get(name, (self.low, self.high))
            return self.model_copy(update={"low": low, "high": high})
        keys = self.keys or map(str, range(len(self.items)))
        items = (v.with_ranges(f"{name}.{k}", ranges) for k, v in zip(keys, self.items, strict=True))
        return self.model_copy(update={"items": tuple(items)})

    def draw(
        self,
        name: str,
        sizes: Mapping[Place, int],
        generator: torch.Generator,
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> Any:
        """Draw an argument like this one. Axes that `sizes` names have the sizes given there."""
        if self.kind == "tensor":
            shape = tuple(sizes.get((name, axis), n) for axis, n in enumerate(self.shape))
            return _draw(self, shape, generator, dtype).to(device)
        if self.kind == "constant":
            return self.value
        keys = self.keys or tuple(map(str, range(len(self.items))))
        items = [
            item.draw(f"{name}.{key}", sizes, generator, device, dtype)
            for key, item in zip(keys, self.items, strict=True)
        ]
        if self.kind == "dict":
            return dict(zip(self.keys, items, strict=True))
        return items if self.kind == "list" else tuple(items)


def _range(value: torch.Tensor) -> tuple[int | float | None, int | float | None]:
    """Return the smallest and the largest value to draw; None for a tensor that is drawn as normal noise."""
    if value.is_meta or not value.numel() or value.is_complex() or value.dtype is torch.bool:
        return None, None
    value = value.detach()
    if not value.is_floating_point():
        return int(value.min()), int(value.max())
    low, high = float(value.min()), float(value.max())
    return (low, high) if 0 <= low < high < float("inf") else (None, None)


def _kept(value: torch.Tensor, name: str) -> int | None:
    """Return the value that marks the positions that count, if a tensor is a mask of padding; else None.

    A mask of padding has zeros and ones. All its rows begin with the same value and change at most once.
    """
    if (
        value.is_meta
        or value.is_floating_point()
        or value.is_complex()
        or value.ndim < 2
        or not value.numel()
    ):
        return None
    rows = value.detach().reshape(-1, value.shape[-1]).long()
    first = int(rows[0, 0])
    if (
        first not in (0, 1)
        or not bool(((rows == 0) | (rows == 1)).all())
        or bool((rows[:, 0] != first).any())
    ):
        return None
    changes = (rows[:, 1:] != rows[:, :-1]).sum(1)
    told = "mask" in name.lower() or (value.dtype is torch.bool and bool(changes.any()))
    return first if told and not bool((changes > 1).any()) else None


def _draw(
    leaf: Leaf, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype | None
) -> torch.Tensor:
    """Draw a tensor: a mask of padding, normal noise, or uniform values in the range of the leaf."""
    own: torch.dtype = getattr(torch, leaf.dtype)
    if leaf.kept is not None and shape and shape[-1]:
        length = shape[-1]
        rows = int(torch.tensor(shape[:-1]).prod()) if len(shape) > 1 else 1
        ends = torch.randint(max(1, length // 2), length + 1, (rows,), generator=generator)
        if rows:
            ends[-1], ends[0] = max(1, length // 2), length  # one row is half padding, one has none
        counts = torch.arange(length)[None, :] < ends[:, None]
        return (counts if leaf.kept else ~counts).reshape(shape).to(own)
    if own.is_floating_point or own.is_complex:
        wanted = dtype if dtype is not None and own.is_floating_point else own
        if leaf.low is None or leaf.high is None:
            return torch.randn(shape, generator=generator, dtype=own if own.is_complex else None).to(wanted)
        return (leaf.low + (leaf.high - leaf.low) * torch.rand(shape, generator=generator)).to(wanted)
    low, high = (0, 1) if leaf.low is None or leaf.high is None else (int(leaf.low), int(leaf.high))
    return torch.randint(low, high + 1, shape, generator=generator).to(own)
