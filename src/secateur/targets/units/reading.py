"""Which numbers in a Hugging Face configuration give a smaller model's shapes, as its own class says.

The class is built without data from configurations in which one number is doubled: that shows which sizes
follow from which number. New numbers come from the sizes that shrank, and the class built from them must have
the smaller shapes. Shapes cannot tell half of the heads from heads of half the size, so there may be several
answers: whoever asks has to run them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from secateur.common.models import named_tensors
from secateur.targets.experts.empty import empty_weights
from secateur.targets.units.configuration import (
    LAYERS,
    Changes,
    changed_configuration,
    has_configuration,
    holders_of,
    named,
    numbers_of,
    quietly,
)

Shapes = Mapping[str, tuple[int, ...]]
"""State-dict name -> shape."""

Axis = tuple[str, int]
"""A tensor's state-dict name and the number of its axis."""

_HEAD_SIZE = "head_dim"
"""What Transformers calls the size of a head, where it is not hidden_size / num_attention_heads."""

_MOST_VALUES, _MOST_OPTIONS = 3, 8
"""How many values of one number, and how many whole answers, are tried."""


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


@dataclass(frozen=True)
class Number:
    """A number in a configuration.

    Attributes:
        path: Where it is.
        value: What it is.
        moves: The axes whose size follows from it.
    """

    path: str
    value: int | float
    moves: frozenset[Axis]


@dataclass(frozen=True)
class Gap:
    """Sizes that no configuration of a class gives: those that follow from no number first.

    Attributes:
        axes: The axes, each with its size from the configuration and the one that it should have.
        paths: The numbers from which the sizes of these axes, and of no others, follow.
        reason: Why they do not give the right ones.
        uneven: Whether that is because these axes shrink by different fractions.
        step: The fraction of these axes' size of which the numbers can give multiples; 0 if that is not why.
    """

    axes: Mapping[Axis, tuple[int, int]] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    reason: str = ""
    uneven: bool = False
    step: Fraction = Fraction(0)


@dataclass(frozen=True)
class Reading:
    """What a configuration would have to say.

    Attributes:
        options: Changes that give the wanted shapes, likelier ones first. One empty mapping if nothing has to
            change, none if no changes do.
        gap: Why, if none of the options is right.
    """

    options: tuple[dict[str, Any], ...]
    gap: Gap


class Builds:
    """A class built from changed configurations, without data: its shapes, each found out once.

    Attributes:
        kind: The model's class.
        config: The configuration to start from; it is left as it was.
        errors: What the class or its configuration said to changes that they refused.
    """

    def __init__(self, kind: type[nn.Module], config: Any) -> None:
        self.kind, self.config = kind, copy.deepcopy(config)
        self.errors: list[tuple[Changes, Exception]] = []
        self._known: dict[frozenset[tuple[str, Any]], Shapes | None] = {}

    def shapes(self, changes: Changes) -> Shapes | None:
        """The shapes after these changes; None if the class cannot be built."""
        key = frozenset(changes.items())
        if key not in self._known:
            try:
                self._known[key] = self._built(changed_configuration(self.config, changes))
            except Exception as error:  # whatever the class, or its configuration, does not take
                self.errors.append((changes, error))
                self._known[key] = None
        return self._known[key]

    def _built(self, config: Any) -> Shapes:
        with quietly():
            with contextlib.suppress(Exception), torch.device("meta"):
                return shapes_of(self.kind(config))
            with empty_weights():  # its constructor may read numbers out of tensors
                return shapes_of(self.kind(config))


def read_configuration(builds: Builds, wanted: Shapes) -> Reading:
    """Find the configurations from which a class has the wanted shapes, those of a smaller model."""
    start, name = builds.shapes({}), builds.kind.__name__
    if start is None:
        return Reading((), Gap(reason=f"{name}(config) fails: {last_line(builds.errors[0][1])}"))
    if not _alike(start, wanted):
        odd = sorted(start.keys() ^ wanted.keys())
        return Reading((), Gap(reason=f"{name}(config) has other tensors: {', '.join(odd[:3])}"))
    return _Reader(builds, start, wanted, _differences(start, wanted)).read()


def configuration_fits(model: nn.Module) -> bool:
    """Whether the model's class, built from the model's configuration alone, has the model's shapes."""
    return has_configuration(model) and Builds(type(model), model.config).shapes({}) == shapes_of(model)


@dataclass(frozen=True, eq=False)
class _Reader:
    """Compares the shapes that a class has with those that it should have.

    Attributes:
        builds: The class.
        start: Its shapes as they are.
        wanted: Its shapes as they should be.
        resized: The axes that differ, with both sizes.
    """

    builds: Builds
    start: Shapes
    wanted: Shapes
    resized: dict[Axis, tuple[int, int]]

    def read(self) -> Reading:
        if not self.resized:
            return Reading(({},), Gap())
        reading = self._with({})
        if not reading.options and (stated := self._statements()):
            reading = self._with(stated)
        return reading

    def _with(self, stated: Changes) -> Reading:
        """The answers after some numbers that have a default were stated."""
        paths = {**dict(numbers_of(self.builds.config)), **stated}
        numbers = [self._number(path, value, stated) for path, value in paths.items()]
        reading = self._solved(numbers, stated)
        if not reading.options and (layers := self._of_layers(numbers, stated)):
            names = {number.path.rpartition(".")[2] for number in layers}
            rest = [n for n in numbers if n.path.rpartition(".")[2] not in names]
            one_by_one = self._solved([*rest, *layers], stated)
            reading = one_by_one if one_by_one.options else reading
        return reading

    def _number(self, path: str, value: int | float, stated: Changes) -> Number:
        """A number with what follows from it: the axes whose size changes when it is doubled, or halved."""
        if not path.endswith(("_id", "_ids")):
            for other in (2 * value, value // 2 if isinstance(value, int) else value / 2):
                shapes = self.builds.shapes({**stated, path: other})
                if shapes is not None:
                    moved = _differences(self.start, shapes) if _alike(self.start, shapes) else ()
                    return Number(path, value, frozenset(moved))
        return Number(path, value, frozenset())

    def _statements(self) -> dict[str, int]:
        """Numbers that the configuration leaves to a default, with that default.

        The size of a head is stated even where the configuration's class does not name it: many models ask
        for it.
        """
        found: dict[str, int] = {}
        sizes = dict.fromkeys(old for old, _ in self.resized.values())
        for prefix, holder in holders_of(self.builds.config):
            options = {
                f"{prefix}{name}": sizes
                for name, value in holder.to_dict().items()
                if value is None and not name.startswith("_") and not name.endswith(("_id", "_ids"))
            }
            width, heads = named(holder, "hidden_size"), named(holder, "num_attention_heads")
            if width and heads and named(holder, _HEAD_SIZE) is None:
                options[f"{prefix}{_HEAD_SIZE}"] = {width // heads: None}
            for path, defaults in options.items():
                if self._number(path, next(iter(defaults)), {}).moves:
                    same = next((v for v in defaults if self.builds.shapes({path: v}) == self.start), None)
                    found |= {path: same} if same is not None else {}
        return found

    def _of_layers(self, numbers: Iterable[Number], stated: Changes) -> list[Number]:
        """Numbers of single layers, where Transformers knows such and the class heeds them."""
        found = []
        for prefix, holder in holders_of(self.builds.config):
            layers = named(holder, "num_hidden_layers") or 0
            if not hasattr(type(holder), LAYERS):
                continue
            for number in numbers:
                name = number.path.removeprefix(prefix)
                if number.path == prefix + name and "." not in name and self._belongs(number):
                    for k in range(layers):
                        own = self._number(f"{prefix}{LAYERS}.{k}.{name}", number.value, stated)
                        if not own.moves or not own.moves < number.moves:
                            break  # the class does not heed it
                        found.append(own)
        return found

    def _belongs(self, number: Number) -> bool:
        """Whether only sizes follow from a number that have to change, in other layers at least."""
        kinds = {_kind(axis) for axis in self.resized}
        return bool(number.moves) and {_kind(axis) for axis in number.moves} <= kinds

    def _solved(self, numbers: Iterable[Number], stated: Changes) -> Reading:
        """Answers in these numbers, each set of numbers that share axes on its own."""
        able = [n for n in numbers if n.moves and n.moves <= self.resized.keys()]
        left = dict(self.resized)
        parts: list[list[dict[str, Any]]] = []
        for component in _components(able):
            if answers := self._answers(component, stated):
                parts.append(answers)
                for axis in frozenset().union(*(n.moves for n in component)):
                    left.pop(axis, None)
        if left:
            return Reading((), self._gap(left, numbers))
        moved = {n.path for n in able}
        kept = {path: value for path, value in stated.items() if path in moved}
        options = ({k: v for part in whole for k, v in part.items()} for whole in itertools.product(*parts))
        found = [{**kept, **changes} for changes in itertools.islice(options, _MOST_OPTIONS)]
        found = [changes for changes in found if self.builds.shapes(changes) == self.wanted]
        return Reading(tuple(found), self._gap(self.resized, numbers))

    def _answers(self, component: list[Number], stated: Changes) -> list[dict[str, Any]]:
        """Changes of these numbers that give their axes the wanted sizes: whole heads before their size."""
        axes = frozenset().union(*(n.moves for n in component))
        alike: dict[tuple[Any, ...], set[int]] = {}
        for name, k in axes:  # what follows from the same numbers in the same way can only be of one size
            key = (self.start[name][k], *(n.path for n in component if (name, k) in n.moves))
            alike.setdefault(key, set()).add(self.wanted[name][k])
        if any(len(sizes) > 1 for sizes in alike.values()):
            return []
        found = []
        for values in itertools.product(*([n.value, *self._values(n)] for n in component)):
            changed = [(n, v) for n, v in zip(component, values, strict=True) if v != n.value]
            if axes <= frozenset().union(*(n.moves for n, _ in changed)):
                changes = {n.path: v for n, v in changed}
                shapes = self.builds.shapes({**stated, **changes})
                if shapes is not None and all(shapes[name][k] == self.wanted[name][k] for name, k in axes):
                    found.append(changes)
        return sorted(found, key=lambda changes: (-len(changes), any(_HEAD_SIZE in path for path in changes)))

    def _ratios(self, number: Number) -> list[Fraction]:
        """By how much the axes of a number shrink, the commonest first."""
        pairs = (self.resized.get(axis, (1, 1)) for axis in number.moves)
        return [ratio for ratio, _ in Counter(Fraction(new, old) for old, new in pairs).most_common()]

    def _values(self, number: Number) -> list[int | float]:
        """What a number may have become."""
        found: list[int | float] = []
        for ratio in self._ratios(number)[:_MOST_VALUES]:
            new = Fraction(number.value) * ratio
            if new.denominator == 1 and isinstance(number.value, int):
                found.append(int(new))
            else:  # what the class multiplies it by is rounded down
                found += [float(new), math.nextafter(float(new), math.inf)]
        return found

    def _gap(self, axes: Mapping[Axis, tuple[int, int]], numbers: Iterable[Number]) -> Gap:
        """Why these axes do not get their sizes."""
        own = [n for n in numbers if self._belongs(n) and n.moves & axes.keys()]
        moved = frozenset().union(*(n.moves for n in own))
        if bare := {axis: pair for axis, pair in axes.items() if axis not in moved}:
            return Gap(bare)
        paths, first = tuple(n.path for n in own), own[0]
        ratios = self._ratios(first)
        if len(ratios) > 1:
            kept: dict[int, set[int]] = {}
            for name, k in first.moves:
                kept.setdefault(self.start[name][k], set()).add(self.wanted[name][k])
            several = [
                " and ".join(map(str, sorted(sizes)[-3:])) for sizes in kept.values() if len(sizes) > 1
            ]
            which = f"keep {several[0]}" if several else "shrink differently"
            reason = f"can only be the same in all layers, which {which}"
            return Gap(axes, paths, reason, uneven=True)
        values = {n.path: self._values(n) for n in own}
        said = [
            e for changes, e in self.builds.errors if any(v in values.get(p, ()) for p, v in changes.items())
        ]
        reason = last_line(said[0]) if said else "a model made from them computes something else"
        value = Fraction(first.value)
        step = 1 / value if (value * ratios[0]).denominator > 1 else Fraction(0)
        return Gap(axes, paths, reason, step=step)


def last_line(error: BaseException) -> str:
    """The end of an error's text, which says what was wrong, without the name of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    text = re.sub(r"^\w*(Error|Exception): ", "", text).rstrip(".")
    return text if len(text) <= 120 else f"{text[:119]}…"


def _kind(axis: Axis) -> Axis:
    """The same axis of all layers."""
    return re.sub(r"\d+", "*", axis[0]), axis[1]


def _alike(some: Shapes, others: Shapes) -> bool:
    """Whether names and ranks are the same."""
    return {n: len(s) for n, s in some.items()} == {n: len(s) for n, s in others.items()}


def _differences(before: Shapes, after: Shapes) -> dict[Axis, tuple[int, int]]:
    """Axes of different sizes, each with both."""
    return {
        (name, k): (old, new)
        for name, shape in before.items()
        for k, (old, new) in enumerate(zip(shape, after[name], strict=True))
        if old != new
    }


def _components(numbers: Iterable[Number]) -> list[list[Number]]:
    """Numbers in sets that share axes."""
    found: list[list[Number]] = []
    for number in numbers:
        touching = [c for c in found if any(n.moves & number.moves for n in c)]
        found = [c for c in found if c not in touching]
        found.append([n for c in touching for n in c] + [number])
    return found
