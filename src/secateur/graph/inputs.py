"""The description of a model's inputs, from which similar ones of several sizes can be drawn."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.utils import _pytree as pytree

from secateur.common.reading import Count
from secateur.errors import SettingError
from secateur.graph.leaf import Leaf, Place, Range, Record
from secateur.graph.wording import CHOICES, place_name, sentence

A = TypeVar("A")

ELEMENTS = 1 << 28
"""The most numbers in all inputs at any size that is tried: a few bytes of a file could name any."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


class OpenAxis(Record):
    """An axis whose size may vary, as far as was tried.

    Attributes:
        places: The axes of inputs that always have the same size.
        size: The traced size.
        other: Another size at which the dense model ran.
        further: Sizes at which the forward pass runs other lines of code. Each was captured too.
        batch: Whether it is the batch: the first axis of the first input, and of all inputs that are as long.
        limit: The sizes that a captured program takes, such as ``at least 2``.
    """

    places: Annotated[tuple[Place, ...], Field(min_length=1)]
    size: Count
    other: Count
    further: tuple[Count, ...] = ()
    batch: bool = False
    limit: str = ""

    def tried(self) -> tuple[int, ...]:
        """Return the sizes at which the dense model ran, each once."""
        return tuple(dict.fromkeys((self.size, self.other, *self.further)))

    def name(self) -> str:
        """Name the axis: ``axis 1 of ids, mask``."""
        inputs = ", ".join(dict.fromkeys(name for name, _ in self.places))
        axes = sorted({axis for _, axis in self.places})
        what = "batch" if self.batch else f"axis {', '.join(map(str, axes))}"
        return f"{what} of {inputs}"

    def __str__(self) -> str:
        """Name the axis and the tried sizes: ``axis 1 of ids, mask (tried 9 and 8)``."""
        *first, last = self.tried()
        return f"{self.name()} (tried {', '.join(map(str, first))} and {last})"


class FixedAxis(Record):
    """An axis whose size may not vary: the dense model took no other size that was tried.

    Attributes:
        places: The axes of inputs that have this size.
        size: The only size that the model takes.
        reason: The model's error at another size.
        where: The line of the user's code that raised it.
    """

    places: Annotated[tuple[Place, ...], Field(min_length=1)]
    size: Count
    reason: str
    where: str = ""

    def __str__(self) -> str:
        """Name the axis and the reason: ``axis 1 of x is 3: expected input … (net.py:7: …)``."""
        axes = ", ".join(map(place_name, self.places))
        return f"{axes} is {self.size}: {self.reason}" + (f" ({self.where})" if self.where else "")


class InputSpec(Record):
    """The arguments that a model was traced with, and which of their axes may have other sizes.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments by name.
        names: Names of the positional arguments.
        open: Axes whose size may vary.
        fixed: Axes whose size may not vary, with the reason.
        together: Whether all open axes may change at once. If not, only one at a time may.
        joint: Sizes of all open axes, in their order, at which the forward pass runs lines of code that it
            runs at no size of one axis alone. Each was captured too.
        methods: Names of further methods that take the same arguments and were captured too.
        drawn: Whether the dense model runs on drawn values. If not, only the user's own values are used.
        training: Whether training mode runs other lines of code than evaluation mode; None if unknown.
        training_at: Sizes of all open axes, in their order, at which training mode runs yet other lines. Each
            was captured too.
        also: Arguments of another kind that were captured too: one tensor more, other values of switches.
        defaults: Parameters of ``forward`` for which no argument was given. With another value than the
            default, the model may do something else.
        head_sizes: Whether the dimensions of attention heads carry units, in place of the heads.

    Example:
        >>> InputSpec.of((torch.zeros(2, 3),), {}).args[0].shape
        (2, 3)
    """

    args: tuple[Leaf, ...] = ()
    kwargs: dict[str, Leaf] = {}  # noqa: RUF012 pydantic copies it
    names: tuple[str, ...] = ()
    open: tuple[OpenAxis, ...] = ()
    fixed: tuple[FixedAxis, ...] = ()
    together: bool = True
    joint: tuple[tuple[Count, ...], ...] = ()
    drawn: bool = True
    methods: tuple[str, ...] = ()
    training: bool | None = None
    training_at: tuple[tuple[Count, ...], ...] = ()
    also: tuple[InputSpec, ...] = ()
    defaults: tuple[str, ...] = ()
    head_sizes: bool = False

    @model_validator(mode="after")
    def _is_consistent(self) -> InputSpec:
        named = (*self.names, *self.kwargs)
        if len(set(named)) != len(named) or (self.names and len(self.names) != len(self.args)):
            raise ValueError(f"expected a name for each of {len(self.args)} arguments")
        found = self.tensors()
        places = [*(p for each in self.open for p in each.places), *(p for f in self.fixed for p in f.places)]
        for name, axis in places:
            if name not in found or not 0 <= axis < len(found[name].shape):
                raise ValueError(f"expected an axis of an input, got axis {axis} of {name[:80]!r}")
        if any(len(sizes) != len(self.open) for sizes in (*self.joint, *self.training_at)):
            raise ValueError(f"expected sizes of {len(self.open)} axes")
        largest = {place: max(axis.tried()) for axis in self.open for place in axis.places}
        for sizes in (*self.joint, *self.training_at):
            largest |= {place: max(n, largest[place]) for place, n in self.at(sizes).items()}
        elements = sum(
            math.prod(max(n, largest.get((name, axis), 0)) for axis, n in enumerate(leaf.shape))
            for name, leaf in found.items()
        )
        if elements > ELEMENTS:
            raise ValueError(f"expected inputs of at most {ELEMENTS:,} numbers in all, got {elements:,}")
        return self

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module | None = None
    ) -> InputSpec:
        """Describe the arguments of a call. The model says what positional ones are called."""
        parameters = parameters_of(model)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = [p.name for p in parameters if p.kind in kinds][: len(args)]
        # Arguments without a name are called by their number.
        names = (*named, *map(str, range(len(named), len(args))))
        return cls(
            args=tuple(Leaf.of(v, n) for v, n in zip(args, names, strict=True)),
            kwargs={k: Leaf.of(v, k) for k, v in kwargs.items()},
            names=names,
            defaults=tuple(
                f"**{p.name}" if p.kind == p.VAR_KEYWORD else p.name
                for p in parameters
                if p.name not in (*names, *kwargs) and (p.default is not p.empty or p.kind == p.VAR_KEYWORD)
            ),
        )

    def switches(self) -> dict[str, int]:
        """Return arguments that are not tensors, by name, with the number of values that were tried.

        Arguments of which every value was tried are left out: `more_inputs` gave a tensor in place of None,
        or True in place of False.
        """
        own = self.leaves()
        found = {}
        for name in (*(n for n, leaf in own.items() if leaf.kind == "constant"), *self.defaults):
            leaves = [leaf for spec in self.also if (leaf := spec.leaves().get(name)) is not None]
            others = [leaf for i, leaf in enumerate(leaves) if leaf not in (own.get(name), *leaves[:i])]
            if all(leaf.kind == "constant" and not isinstance(leaf.value, bool) for leaf in others):
                found[name] = 1 + len(others)
        return found

    def is_like(self, other: InputSpec) -> bool:
        """Whether the arguments of another call differ only in sizes and values of tensors."""
        return bool(_kinds(self.leaves()) == _kinds(other.leaves()))

    def leaves(self) -> dict[str, Leaf]:
        """Return the description of each argument, by name."""
        names = self.names or tuple(map(str, range(len(self.args))))
        return {**dict(zip(names, self.args, strict=True)), **self.kwargs}

    def tensors(self) -> dict[str, Leaf]:
        """Return all tensors by name, in order."""
        return dict(pair for name, leaf in self.leaves().items() for pair in leaf.tensors(name))

    def with_ranges(self, ranges: Mapping[str, Range]) -> InputSpec:
        """Return the same inputs with the given ranges of values for the tensors in `ranges`."""
        changed = {name: leaf.with_ranges(name, ranges) for name, leaf in self.leaves().items()}
        kwargs = {name: changed.pop(name) for name in self.kwargs}
        return self.model_copy(update={"args": tuple(changed.values()), "kwargs": kwargs})

    def example(
        self,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        sizes: Mapping[Place, int] | None = None,
    ) -> Arguments:
        """Draw arguments like those described; equal seeds give equal ones.

        Args:
            seed: Seed for the draw.
            device: The device of the tensors.
            dtype: The dtype of floats; None for that of the description.
            sizes: Other sizes for some axes.
        """
        generator = torch.Generator().manual_seed(seed)
        made = {n: v.draw(n, sizes or {}, generator, device, dtype) for n, v in self.leaves().items()}
        kwargs = {name: made.pop(name) for name in self.kwargs}
        return tuple(made.values()), kwargs

    def other_sizes(self) -> list[tuple[str, dict[Place, int]]]:
        """Return the sizes to try beside the traced ones, each with a title."""
        changes = [(str(a), {place: a.other for place in a.places}) for a in self.open]
        if len(changes) > 1 and self.together:
            every = {k: v for _, change in changes for k, v in change.items()}
            changes = [("; ".join(title for title, _ in changes), every)]
        listed = [sizes for _, sizes in changes]
        return changes + [(title, sizes) for title, sizes in self.other_path_sizes() if sizes not in listed]

    def other_path_sizes(self) -> list[tuple[str, dict[Place, int]]]:
        """Return the sizes at which the forward pass takes other execution paths, each with a title."""
        single = [
            (f"{axis.name()} {size}", dict.fromkeys(axis.places, size))
            for axis in self.open
            for size in axis.further
        ]
        return single + [
            (
                "; ".join(f"{axis.name()} {n}" for axis, n in zip(self.open, sizes, strict=True)),
                self.at(sizes),
            )
            for sizes in self.joint
        ]

    def at(self, sizes: tuple[int, ...]) -> dict[Place, int]:
        """Return, for each axis of an input that is open, its size; `sizes` are in the order of `open`."""
        return {place: n for axis, n in zip(self.open, sizes, strict=True) for place in axis.places}

    def examples(
        self, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
        """Draw arguments of the traced size and of every other one: title, positional, keyword arguments."""
        sets: list[tuple[str, dict[Place, int]]] = [("as traced", {}), *self.other_sizes()]
        return [(t, *self.example(seed=seed, device=device, dtype=dtype, sizes=s)) for t, s in sets]

    def trials(
        self,
        given: Arguments | None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        other_sizes: bool = True,
    ) -> list[tuple[str, list[Arguments]]]:
        """Return arguments of the traced size and of every other one, to compare two models on.

        Args:
            given: The user's own arguments; they take the place of drawn ones of the traced size. At other
                sizes they are cropped or repeated, and come second where the model runs on drawn values.
            seed: Seed for the draw.
            device: The device of drawn tensors.
            other_sizes: Whether to return other sizes than the traced one.

        Returns:
            For each size a title, and one or more arguments. Try them in order until the dense model runs on
            one: what it refuses cannot be compared.
        """
        found = []
        for title, sizes in [("the traced size", {}), *(self.other_sizes() if other_sizes else ())]:
            found.append((title, self.trials_at(sizes, given, seed=seed, device=device)))
        for spec in self.also if other_sizes else ():
            found += [(t, [(args, kwargs)]) for t, args, kwargs in spec.examples(seed=seed, device=device)]
        return found

    def trials_at(
        self,
        sizes: Mapping[Place, int],
        given: Arguments | None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> list[Arguments]:
        """Return arguments with these sizes, to be tried in order: see `trials`."""
        options = []
        if given is None or (self.drawn and sizes):
            options.append(self.example(seed=seed, device=device, sizes=sizes))
        if given is not None:
            options.append(resized(self, given, sizes))
        return options

    def arguments(self, example_inputs: Any, device: torch.device) -> Arguments:
        """Return the user's example inputs on a device; drawn ones if there are none."""
        if example_inputs is None:
            return self.example(device=device)
        return call_arguments(example_inputs, device)

    def sentence(self, *, program: bool = False) -> str:
        """Say which sizes may change, and which must stay and why. `program`: for a captured program."""
        return sentence(self, program=program)

    def describe(self) -> str:
        """Return `sentence()`, a line on how far choices were tried, and a line for each fixed axis."""
        choices = [CHOICES] if self.open or self.fixed else []
        return "\n".join([self.sentence(), *choices, *(f"fixed: {axis}" for axis in self.fixed)])


def _kinds(leaves: Mapping[Any, Leaf]) -> Any:
    """Return all about arguments except the sizes and values of tensors."""
    return {
        name: (leaf.kind, len(leaf.shape), leaf.dtype, leaf.value, _kinds(dict(enumerate(leaf.items))))
        for name, leaf in leaves.items()
    }


def parameters_of(model: nn.Module | None) -> list[inspect.Parameter]:
    """Return the parameters of a model's forward pass; none if they cannot be read."""
    try:
        return list(inspect.signature(model.forward).parameters.values()) if model is not None else []
    except (TypeError, ValueError):
        return []


def call_arguments(example_inputs: Any, device: torch.device | None = None) -> Arguments:
    """Turn what a user passes as example inputs into positional and keyword arguments.

    A tensor is the only argument. A tuple or a list holds positional arguments, a mapping keyword arguments.
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
    moved: Arguments = (args, kwargs)
    if device is not None:
        moved = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), moved)
    return with_distinct_tensors(moved)


def with_distinct_tensors(arguments: A) -> A:
    """Copy tensors that occur a second time: a capture would take the two inputs for the same one."""
    seen: set[int] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in seen:
            return tensor.clone()
        seen.add(id(tensor))
        return tensor

    found: A = pytree.tree_map_only(torch.Tensor, own, arguments)
    return found


def batch_size(arguments: Any) -> int:
    """Return the size of the first axis of the first tensor that has axes; 0 if there is none."""
    tensors = (v for v in pytree.tree_leaves(arguments) if isinstance(v, torch.Tensor))
    return next((len(v) for v in tensors if v.ndim), 0)


def samples_of(arguments: A, positions: list[int]) -> A:
    """Take samples of a batch, which may repeat. Arguments without a batch axis stay as they are."""
    batch = batch_size(arguments)

    def taken(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch:
            return value[positions]
        return value

    found: A = pytree.tree_map(taken, arguments)
    return found


def resized(spec: InputSpec, arguments: Arguments, sizes: Mapping[Place, int]) -> Arguments:
    """Crop the user's own arguments to other sizes, or repeat them from the start."""
    names = iter(spec.tensors())

    def change(value: torch.Tensor) -> torch.Tensor:
        name = next(names, "")  # the user may pass more tensors than were traced
        for axis, n in enumerate(value.shape):
            size = sizes.get((name, axis), n)
            if size != n:
                positions = torch.arange(size, device=value.device) % max(n, 1)
                value = value.index_select(axis, positions)
        return value

    found: Arguments = pytree.tree_map_only(torch.Tensor, change, arguments)
    return found
