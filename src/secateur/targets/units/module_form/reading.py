"""Find the numbers in a Hugging Face configuration that give the shapes of a smaller model.

The class is built, without data, from configurations in which one number is doubled. That shows which sizes
depend on which number. The sizes that shrank then give the new numbers, and the class built from them must
have the smaller shapes. Shapes do not tell half of the heads from heads of half the size. So there may be
several answers, and the caller has to run them.
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
from secateur.targets.units.module_form.configuration import (
    LAYERS,
    Changes,
    changed_configuration,
    has_configuration,
    named,
    nested_configurations,
    numbers_of,
    quietly,
)

Shapes = Mapping[str, tuple[int, ...]]
"""Name in the state dict -> shape."""

Axis = tuple[str, int]
"""An axis: the tensor's name in the state dict, and the number of the axis."""

_HEAD_SIZE = "head_dim"
"""Transformers' name for the size of a head, if that is not hidden_size / num_attention_heads."""

_MOST_VALUES, _MOST_OPTIONS = 3, 8
"""The most values of one number, and the most whole answers, that are tried."""


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


@dataclass(frozen=True)
class Number:
    """A number in a configuration.

    Attributes:
        path: Its path in the configuration.
        value: Its value.
        moves: The axes whose size depends on it.
    """

    path: str
    value: int | float
    moves: frozenset[Axis]


@dataclass(frozen=True)
class Gap:
    """Sizes that no configuration of a class gives. If some depend on no number, these are named.

    Attributes:
        axes: The axes, each with its size from the configuration and the size that it should have.
        paths: The numbers that decide the sizes of these axes and of no others.
        reason: Why these numbers do not give the right sizes.
        uneven: Whether the reason is that the axes shrink by different fractions.
        step: The numbers give only multiples of this fraction of the size; 0 if that is not the reason.
    """

    axes: Mapping[Axis, tuple[int, int]] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    reason: str = ""
    uneven: bool = False
    step: Fraction = Fraction(0)


@dataclass(frozen=True)
class Reading:
    """The changes of a configuration that give the wanted shapes.

    Attributes:
        options: Possible changes, likely ones first. One empty mapping if nothing has to change; no entry if
            no change gives the wanted shapes.
        gap: The reason, if there is no option, or if none turns out right.
    """

    options: tuple[dict[str, Any], ...]
    gap: Gap


class Builds:
    """Builds a class from changed configurations, without data, and remembers the shapes.

    Attributes:
        kind: The model's class.
        config: The configuration to start from; it is left as it was.
        errors: The errors of the class or its configuration, with the changes that caused them.
    """

    def __init__(self, kind: type[nn.Module], config: Any) -> None:
        self.kind, self.config = kind, copy.deepcopy(config)
        self.errors: list[tuple[Changes, Exception]] = []
        self._known: dict[frozenset[tuple[str, str]], Shapes | None] = {}

    def shapes(self, changes: Changes) -> Shapes | None:
        """Return the shapes after these changes; None if the class cannot be built."""
        key = frozenset((path, repr(value)) for path, value in changes.items())
        if key not in self._known:
            try:
                self._known[key] = self._built(changed_configuration(self.config, changes))
            except Exception as error:  # the class or its configuration may refuse numbers in any way
                self.errors.append((changes, error))
                self._known[key] = None
        return self._known[key]

    def _built(self, config: Any) -> Shapes:
        with quietly():
            with contextlib.suppress(Exception), torch.device("meta"):
                return shapes_of(self.kind(config))
            with empty_weights():  # its constructor may read values of tensors
                return shapes_of(self.kind(config))


def read_configuration(builds: Builds, wanted: Shapes) -> Reading:
    """Find the configurations with which a class has the wanted shapes."""
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
        builds: Builds the class.
        start: The shapes from the configuration.
        wanted: The shapes that it should have.
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
        if not reading.options and (stated := self._defaults()):
            reading = self._with(stated)
        return reading

    def _with(self, stated: Changes) -> Reading:
        """Find options after some numbers with a default were written into the configuration."""
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
        """Find the axes whose size depends on a number: it changes when the number is doubled or halved."""
        if not path.endswith(("_id", "_ids")):
            for other in (2 * value, value // 2 if isinstance(value, int) else value / 2):
                shapes = self.builds.shapes({**stated, path: other})
                if shapes is not None:
                    moved = _differences(self.start, shapes) if _alike(self.start, shapes) else ()
                    return Number(path, value, frozenset(moved))
        return Number(path, value, frozenset())

    def _defaults(self) -> dict[str, int]:
        """Return the numbers that the configuration leaves to a default, with that default.

        The size of a head is among them even if the configuration's class has no such field: many models read
        it.
        """
        found: dict[str, int] = {}
        sizes = dict.fromkeys(old for old, _ in self.resized.values())
        for prefix, config in nested_configurations(self.builds.config):
            options = {
                f"{prefix}{name}": sizes
                for name, value in config.to_dict().items()
                if value is None and not name.startswith("_") and not name.endswith(("_id", "_ids"))
            }
            width, heads = named(config, "hidden_size"), named(config, "num_attention_heads")
            if width and heads and named(config, _HEAD_SIZE) is None:
                options[f"{prefix}{_HEAD_SIZE}"] = {width // heads: None}
            for path, defaults in options.items():
                if self._number(path, next(iter(defaults)), {}).moves:
                    same = next((v for v in defaults if self.builds.shapes({path: v}) == self.start), None)
                    found |= {path: same} if same is not None else {}
        return found

    def _of_layers(self, numbers: Iterable[Number], stated: Changes) -> list[Number]:
        """Return numbers of single layers, if Transformers has them and the class reads them."""
        found = []
        for prefix, config in nested_configurations(self.builds.config):
            layers = named(config, "num_hidden_layers") or 0
            if not hasattr(type(config), LAYERS):
                continue
            for number in numbers:
                name = number.path.removeprefix(prefix)
                if number.path == prefix + name and "." not in name and self._belongs(number):
                    for k in range(layers):
                        own = self._number(f"{prefix}{LAYERS}.{k}.{name}", number.value, stated)
                        if not own.moves or not own.moves < number.moves:
                            break  # the class does not read it
                        found.append(own)
        return found

    def _belongs(self, number: Number) -> bool:
        """Whether all sizes that depend on a number have to change, here or in another layer."""
        kinds = {_kind(axis) for axis in self.resized}
        return bool(number.moves) and {_kind(axis) for axis in number.moves} <= kinds

    def _solved(self, numbers: Iterable[Number], stated: Changes) -> Reading:
        """Find options for these numbers. Numbers that share no axes are solved separately."""
        able = [n for n in numbers if n.moves and n.moves <= self.resized.keys()]
        left = dict(self.resized)
        parts: list[list[dict[str, Any]]] = []
        for component in _components(able):
            if found := self._options(component, stated):
                parts.append(found)
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

    def _options(self, component: list[Number], stated: Changes) -> list[dict[str, Any]]:
        """Return changes of these numbers that give the wanted sizes; fewer heads before smaller heads."""
        axes = frozenset().union(*(n.moves for n in component))
        alike: dict[tuple[Any, ...], set[int]] = {}
        for name, k in axes:  # axes that depend on the same numbers in the same way have one size
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
        """Return the ratios by which the axes of a number shrink, common ones first."""
        pairs = (self.resized.get(axis, (1, 1)) for axis in number.moves)
        return [ratio for ratio, _ in Counter(Fraction(new, old) for old, new in pairs).most_common()]

    def _values(self, number: Number) -> list[int | float]:
        """Return possible new values of a number."""
        found: list[int | float] = []
        for ratio in self._ratios(number)[:_MOST_VALUES]:
            new = Fraction(number.value) * ratio
            if new.denominator == 1 and isinstance(number.value, int):
                found.append(int(new))
            else:  # the class may round a product down, so the next float is tried too
                found += [float(new), math.nextafter(float(new), math.inf)]
        return found

    def _gap(self, axes: Mapping[Axis, tuple[int, int]], numbers: Iterable[Number]) -> Gap:
        """Say why these axes do not get their sizes."""
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
        messages = [
            e for changes, e in self.builds.errors if any(v in values.get(p, ()) for p, v in changes.items())
        ]
        reason = last_line(messages[0]) if messages else "a model made from them computes something else"
        value = Fraction(first.value)
        step = 1 / value if (value * ratios[0]).denominator > 1 else Fraction(0)
        return Gap(axes, paths, reason, step=step)


def last_line(error: BaseException) -> str:
    """Return the last line of an error, which says what was wrong, without the error's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    text = re.sub(r"^\w*(Error|Exception): ", "", text).rstrip(".")
    return text if len(text) <= 120 else f"{text[:119]}…"


def _kind(axis: Axis) -> Axis:
    """Return a name that the same axis has in all layers."""
    return re.sub(r"\d+", "*", axis[0]), axis[1]


def _alike(some: Shapes, others: Shapes) -> bool:
    """Whether the names and ranks of tensors are the same."""
    return {n: len(s) for n, s in some.items()} == {n: len(s) for n, s in others.items()}


def _differences(before: Shapes, after: Shapes) -> dict[Axis, tuple[int, int]]:
    """Return the axes with different sizes, each with both sizes."""
    return {
        (name, k): (old, new)
        for name, shape in before.items()
        for k, (old, new) in enumerate(zip(shape, after[name], strict=True))
        if old != new
    }


def _components(numbers: Iterable[Number]) -> list[list[Number]]:
    """Split numbers into sets: numbers that share axes are in one set."""
    found: list[list[Number]] = []
    for number in numbers:
        touching = [c for c in found if any(n.moves & number.moves for n in c)]
        found = [c for c in found if c not in touching]
        found.append([n for c in touching for n in c] + [number])
    return found
