"""What a model takes, as data: enough to call it again, at several sizes, without the user's tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SettingError
from secateur.graph.leaf import Leaf, Place, Range, Record
from secateur.graph.wording import place_name, sentence

A = TypeVar("A")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


class OpenAxis(Record):
    """An axis that may have any size, as far as tried.

    Attributes:
        places: The axes of inputs that have this size, together.
        size: When traced.
        other: Another size at which the dense model ran too.
        further: Sizes at which its forward pass runs other lines; each was captured too.
        batch: Whether it is the batch: the first axis of the first input, and of all that are as long.
        limit: Which sizes a captured program takes, in words: ``at least 2``.
    """

    places: tuple[Place, ...]
    size: int
    other: int
    further: tuple[int, ...] = ()
    batch: bool = False
    limit: str = ""

    def tried(self) -> tuple[int, ...]:
        """The sizes at which the dense model ran, each once."""
        return tuple(dict.fromkeys((self.size, self.other, *self.further)))

    def name(self) -> str:
        """``axis 1 of ids, mask``."""
        inputs = ", ".join(dict.fromkeys(name for name, _ in self.places))
        axes = sorted({axis for _, axis in self.places})
        what = "batch" if self.batch else f"axis {', '.join(map(str, axes))}"
        return f"{what} of {inputs}"

    def __str__(self) -> str:
        """``axis 1 of ids, mask (tried 9 and 8)``."""
        *first, last = self.tried()
        return f"{self.name()} (tried {', '.join(map(str, first))} and {last})"


class FixedAxis(Record):
    """An axis at which the dense model took no other size that was tried.

    Attributes:
        places: The axes of inputs that have this size.
        size: The only size.
        reason: What the model said at another size.
        where: The line of the user's code that said it.
    """

    places: tuple[Place, ...]
    size: int
    reason: str
    where: str = ""

    def __str__(self) -> str:
        """``axis 1 of x is 3: expected input … (net.py:7: …)``."""
        axes = ", ".join(map(place_name, self.places))
        return f"{axes} is {self.size}: {self.reason}" + (f" ({self.where})" if self.where else "")


class InputSpec(Record):
    """The arguments a model was traced with, and which of their axes may have other sizes.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments by name.
        names: Names of the positional arguments.
        open: Axes that may vary.
        fixed: Axes that may not, with the reason.
        together: Whether all open axes may have their other size at once; if not, one at a time.
        joint: Sizes of all open axes, in their order, at which the forward pass runs lines that it runs at
            no size of one axis alone; each was captured too.
        methods: Further methods that take the same arguments and were traced too.
        drawn: Whether the dense model takes drawn values; if not, only the user's own serve.
        training: Whether a forward pass in training mode goes another way than one in evaluation mode; None
            if that is not known.
        training_at: Sizes of all open axes, in their order, at which training mode goes yet another way; each
            was captured too.
        also: Arguments of another kind that were traced too: a tensor more, other values of switches.
        defaults: Parameters of ``forward`` that no argument was given for. Another value than the default may
            make it do something else.

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
    joint: tuple[tuple[int, ...], ...] = ()
    drawn: bool = True
    methods: tuple[str, ...] = ()
    training: bool | None = None
    training_at: tuple[tuple[int, ...], ...] = ()
    also: tuple[InputSpec, ...] = ()
    defaults: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module | None = None
    ) -> InputSpec:
        """Describe a call's arguments; `model` gives the names of the positional ones."""
        parameters = _parameters(model)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        known = [p.name for p in parameters if p.kind in kinds][: len(args)]
        names = (*known, *map(str, range(len(known), len(args))))  # their numbers where they have none
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
        """Arguments that are no tensors, by name, with the number of values that each was looked at with.

        Left out are those without a further value: `more_inputs` gave a tensor for None, or True for False.
        """
        own = self._leaves()
        found = {}
        for name in (*(n for n, leaf in own.items() if leaf.kind == "constant"), *self.defaults):
            leaves = [leaf for spec in self.also if (leaf := spec._leaves().get(name)) is not None]
            others = [leaf for i, leaf in enumerate(leaves) if leaf not in (own.get(name), *leaves[:i])]
            if all(leaf.kind == "constant" and not isinstance(leaf.value, bool) for leaf in others):
                found[name] = 1 + len(others)
        return found

    def is_like(self, other: InputSpec) -> bool:
        """Whether another call's arguments differ in sizes and values of tensors alone."""
        return bool(_kinds(self._leaves()) == _kinds(other._leaves()))

    def _leaves(self) -> dict[str, Leaf]:
        names = self.names or tuple(map(str, range(len(self.args))))
        return {**dict(zip(names, self.args, strict=True)), **self.kwargs}

    def tensors(self) -> dict[str, Leaf]:
        """All tensors by name, in order."""
        return dict(pair for name, leaf in self._leaves().items() for pair in leaf.tensors(name))

    def with_ranges(self, ranges: Mapping[str, Range]) -> InputSpec:
        """The same inputs, with values in the given range in the tensors named there."""
        changed = {name: leaf.with_ranges(name, ranges) for name, leaf in self._leaves().items()}
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
        """Drawn arguments, the same for one seed; floats in `dtype`, and axes in `sizes` of those sizes."""
        generator = torch.Generator().manual_seed(seed)
        made = {n: v.draw(n, sizes or {}, generator, device, dtype) for n, v in self._leaves().items()}
        kwargs = {name: made.pop(name) for name in self.kwargs}
        return tuple(made.values()), kwargs

    def other_sizes(self) -> list[tuple[str, dict[Place, int]]]:
        """What to try beside the traced size: a title, and the sizes that differ."""
        changes = [(str(a), {place: a.other for place in a.places}) for a in self.open]
        if len(changes) > 1 and self.together:
            every = {k: v for _, change in changes for k, v in change.items()}
            changes = [("; ".join(title for title, _ in changes), every)]
        known = [sizes for _, sizes in changes]
        return changes + [(title, sizes) for title, sizes in self.other_courses() if sizes not in known]

    def other_courses(self) -> list[tuple[str, dict[Place, int]]]:
        """A title and the sizes that differ, for each size at which the forward pass runs other lines."""
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
        """The sizes of all open axes, in their order, by place."""
        return {place: n for axis, n in zip(self.open, sizes, strict=True) for place in axis.places}

    def examples(
        self, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
        """Drawn arguments at the traced size and at every other one: a title, positional and keyword ones."""
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
        """Arguments at the traced size and at every other one.

        For each size there is a title, and what to run in turn until the dense model takes it: what it
        refuses is no evidence of anything.

        Args:
            given: The user's own arguments, in place of drawn ones of the traced size. At other sizes drawn
                ones come first where the model takes such, then the user's own, cropped or repeated.
            seed: Of what is drawn.
            device: Where drawn tensors will be.
            other_sizes: Whether to give more than the traced size.
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
        """Arguments with some axes of other sizes, what to run in turn: see `trials`."""
        options = []
        if given is None or (self.drawn and sizes):
            options.append(self.example(seed=seed, device=device, sizes=sizes))
        if given is not None:
            options.append(resized(self, given, sizes))
        return options

    def arguments(self, example_inputs: Any, device: torch.device) -> Arguments:
        """What a user passed as example inputs, on `device`; `example` if that is None."""
        if example_inputs is None:
            return self.example(device=device)
        return call_arguments(example_inputs, device)

    def sentence(self, *, program: bool = False) -> str:
        """Which sizes may change, which must stay and why; `program`: in a captured program."""
        return sentence(self, program=program)

    def describe(self) -> str:
        """The same, then for each fixed axis what the model said at another size, a line each."""
        return "\n".join([self.sentence(), *(f"fixed: {axis}" for axis in self.fixed)])


def _kinds(leaves: Mapping[Any, Leaf]) -> Any:
    """What arguments are, without the sizes and values of tensors."""
    return {
        name: (leaf.kind, len(leaf.shape), leaf.dtype, leaf.value, _kinds(dict(enumerate(leaf.items))))
        for name, leaf in leaves.items()
    }


def _parameters(model: nn.Module | None) -> list[inspect.Parameter]:
    """The parameters of a model's forward pass, as far as it tells."""
    try:
        return list(inspect.signature(model.forward).parameters.values()) if model is not None else []
    except (TypeError, ValueError):
        return []


def call_arguments(example_inputs: Any, device: torch.device | None = None) -> Arguments:
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
    moved: Arguments = (args, kwargs)
    if device is not None:
        moved = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), moved)
    return apart(moved)


def apart(arguments: A) -> A:
    """The same arguments, in which no tensor comes twice: a capture would take one input for the other."""
    seen: set[int] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in seen:
            return tensor.clone()
        seen.add(id(tensor))
        return tensor

    found: A = pytree.tree_map_only(torch.Tensor, own, arguments)
    return found


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


def resized(spec: InputSpec, arguments: Arguments, sizes: Mapping[Place, int]) -> Arguments:
    """The user's own arguments cropped, or repeated from the start, to other sizes."""
    names = iter(spec.tensors())

    def change(value: torch.Tensor) -> torch.Tensor:
        name = next(names, "")  # the user may pass more than was traced
        for axis, n in enumerate(value.shape):
            size = sizes.get((name, axis), n)
            if size != n:
                positions = torch.arange(size, device=value.device) % max(n, 1)
                value = value.index_select(axis, positions)
        return value

    found: Arguments = pytree.tree_map_only(torch.Tensor, change, arguments)
    return found
