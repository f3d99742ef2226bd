"""Example inputs as data: enough of them to call a model again without the user's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils import _pytree as pytree

from secateur.errors import SettingError

A = TypeVar("A")


class Leaf(BaseModel):
    """One argument: a tensor's shape and dtype, a constant, or a container of these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tensor", "constant", "list", "tuple", "dict"]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: bool | int | float | str | None = None
    items: tuple[Leaf, ...] = ()
    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any) -> Leaf:
        """Describe `value`; raises SettingError for a type that a saved plan could not hold."""
        if isinstance(value, torch.Tensor):
            return cls(kind="tensor", shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        if value is None or isinstance(value, bool | int | float | str):
            return cls(kind="constant", value=value)
        if isinstance(value, list | tuple):
            kind: Literal["list", "tuple"] = "list" if isinstance(value, list) else "tuple"
            return cls(kind=kind, items=tuple(cls.of(v) for v in value))
        if isinstance(value, Mapping):
            return cls(
                kind="dict", keys=tuple(map(str, value)), items=tuple(cls.of(v) for v in value.values())
            )
        raise SettingError(
            f"example inputs: expected tensors, numbers, strings, lists, tuples and mappings, got "
            f"{type(value).__name__}. Pass the model plain tensors, or wrap it in a module that does."
        )

    def example(
        self, generator: torch.Generator, device: torch.device | str, dtype: torch.dtype | None
    ) -> Any:
        """A value of this description: normal floats, zero integers and False booleans."""
        if self.kind == "tensor":
            own = getattr(torch, self.dtype)
            if not own.is_floating_point:
                return torch.zeros(self.shape, dtype=own, device=device)
            return torch.randn(self.shape, generator=generator).to(device, dtype or own)
        if self.kind == "constant":
            return self.value
        items = [item.example(generator, device, dtype) for item in self.items]
        if self.kind == "dict":
            return dict(zip(self.keys, items, strict=True))
        return items if self.kind == "list" else tuple(items)


class InputSpec(BaseModel):
    """The arguments a model was traced with, by shape and dtype.

    Example:
        >>> InputSpec.of((torch.zeros(2, 3),), {}).args[0].shape
        (2, 3)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    args: tuple[Leaf, ...] = ()
    kwargs: dict[str, Leaf] = {}

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InputSpec:
        """Describe a call's arguments."""
        return cls(args=tuple(map(Leaf.of, args)), kwargs={k: Leaf.of(v) for k, v in kwargs.items()})

    def example(
        self, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of this description, deterministic in `seed`; floats in `dtype` if it is given."""
        generator = torch.Generator().manual_seed(seed)
        args = tuple(leaf.example(generator, device, dtype) for leaf in self.args)
        return args, {k: leaf.example(generator, device, dtype) for k, leaf in self.kwargs.items()}

    def arguments(self, example_inputs: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a user passed as example inputs, on `device`; `example` if that is None."""
        if example_inputs is None:
            return self.example(device=device)
        return call_arguments(example_inputs, device)


def call_arguments(
    example_inputs: Any, device: torch.device | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what a user passes as example inputs.

    A tensor is the only argument, a tuple or list holds the positional ones, a mapping the keyword ones.
    Tensors are moved to `device` if it is given.

    Raises:
        SettingError: If `example_inputs` is none of these.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    elif isinstance(example_inputs, Mapping):
        kwargs = {str(k): v for k, v in example_inputs.items()}
    else:
        raise SettingError(
            f"example_inputs: expected a tensor, a tuple of positional arguments or a mapping of keyword "
            f"arguments, got {type(example_inputs).__name__}."
        )
    if device is None:
        return args, kwargs
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(device), (args, kwargs)
    )
    return moved


def batch_size(arguments: Any) -> int:
    """The length of the first tensor's first axis; 0 if there is none."""
    tensors = (v for v in pytree.tree_leaves(arguments) if isinstance(v, torch.Tensor))
    return next((len(v) for v in tensors if v.ndim), 0)


def samples_of(arguments: A, positions: list[int]) -> A:
    """The same arguments with these samples of the batch, which may repeat; what has no batch axis stays."""
    batch = batch_size(arguments)

    def taken(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch:
            return value[positions]
        return value

    found: A = pytree.tree_map(taken, arguments)
    return found
