"""Numbers that remember which attributes of a model they come from.

While a model runs with tracked attributes, ``x.view(n, self.heads, self.width // self.heads)`` shows where
each size comes from. So an attribute is changed only if its value is used for a size that shrinks, and never
because it equals such a size by chance.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from torch import nn

from secateur.common.preserving import preserved
from secateur.targets.units.module_form.attributes import follows
from secateur.targets.units.module_form.uncached import uncached

Environment = Mapping[str, int]
"""``module.path.attribute`` -> its value."""


class Tracked(int):
    """An integer that knows the attributes that it was computed from.

    Attributes:
        sources: The paths of these attributes.
        formula: Computes the number from other values of these attributes.
    """

    sources: frozenset[str]
    formula: Callable[[Environment], int]

    @classmethod
    def attribute(cls, path: str, value: int) -> Tracked:
        """Make a tracked number from an attribute."""
        return cls.computed(value, frozenset({path}), lambda environment: environment.get(path, value))

    @classmethod
    def computed(cls, value: int, sources: frozenset[str], formula: Callable[[Environment], int]) -> Tracked:
        """Make a tracked number that is computed from attributes."""
        new = cls(value)
        new.sources, new.formula = sources, formula
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracked:
        """Return the number itself, which never changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it as a plain number."""
        return int, (int(self),)


def _combined(name: str) -> Callable[[Any, Any], Any]:
    """Make an operator of `Tracked` whose result is tracked too."""
    plain = getattr(int, name)

    def operate(self: Tracked, other: Any) -> Any:
        value = plain(self, other)
        if type(value) is not int:
            return value
        if isinstance(other, Tracked):
            return Tracked.computed(
                value, self.sources | other.sources, lambda e: plain(self.formula(e), other.formula(e))
            )
        return Tracked.computed(value, self.sources, lambda e: plain(self.formula(e), other))

    return operate


# A plain number divided by an attribute gives a plain one: as a rule that is a tensor's size, which follows.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod"):
    setattr(Tracked, f"__{_name}__", _combined(f"__{_name}__"))


def _negative(self: Tracked) -> Tracked:
    return Tracked.computed(-int(self), self.sources, lambda e: -self.formula(e))


Tracked.__neg__ = _negative  # type: ignore[method-assign,assignment]


def _number(name: str) -> Callable[..., Any]:
    """Make an operator of `Tracked` that gives a float. The use is recorded, since a float is not tracked."""
    plain = getattr(int, name)

    def operate(self: Tracked, *others: Any) -> Any:
        if (uses := _uses.get()) is not None:
            uses.numbers += [v for v in (self, *others) if isinstance(v, Tracked)]
        return plain(self, *others)

    return operate


for _name in ("__pow__", "__rpow__", "__truediv__", "__rtruediv__", "__float__"):
    setattr(Tracked, _name, _number(_name))


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    plain = getattr(int, name)

    def compare(self: Tracked, other: Any) -> Any:
        outcome = plain(self, other)
        if (uses := _uses.get()) is not None and type(outcome) is bool:
            uses.equal.append((self, other, outcome == (name == "__eq__")))
        return outcome

    return compare


for _name in ("__eq__", "__ne__"):
    setattr(Tracked, _name, _comparison(_name))
Tracked.__hash__ = int.__hash__  # type: ignore[method-assign]


@dataclass
class Uses:
    """What a run did with tracked numbers, except passing them to calls.

    Attributes:
        numbers: The tracked numbers from which it computed floats, such as a scale. They have to stay.
        equal: Its comparisons of tracked numbers: the number, the other number, whether they were equal.
    """

    numbers: list[Tracked] = field(default_factory=list)
    equal: list[tuple[Tracked, Any, bool]] = field(default_factory=list)


_uses: ContextVar[Uses | None] = ContextVar("uses", default=None)

P = ParamSpec("P")
R = TypeVar("R")


def unnoted(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function, so that its use of tracked numbers is not recorded."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _uses.set(None)
        try:
            return function(*args, **kwargs)
        finally:
            _uses.reset(token)

    return run


@contextmanager
def tracked(model: nn.Module) -> Iterator[Uses]:
    """Inside, integer attributes of modules are tracked. Everything is restored afterwards.

    These are integers, lists and tuples of integers, and those in a configuration object. Layers are left out
    if their attributes follow their tensors anyway. Functions that remember results run anew, since they
    would return plain numbers of an earlier run.
    """
    with preserved(model), uncached():
        for path, module in model.named_modules():
            if not follows(module):
                for name, value in list(vars(module).items()):
                    vars(module)[name] = _tracked(f"{path}.{name}".lstrip("."), name, value)
        uses = Uses()
        token = _uses.set(uses)
        try:
            yield uses
        finally:
            _uses.reset(token)


_SKIPPED = frozenset(vars(nn.Module())) | {"training"}


def _tracked(path: str, name: str, value: Any) -> Any:
    """Track an attribute: an integer, a list of integers, or the integers of a configuration."""
    if name in _SKIPPED:
        return value
    if type(value) is int:
        return Tracked.attribute(path, value)
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(Tracked.attribute(f"{path}.{k}", v) for k, v in enumerate(value))
    if "config" in name and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type | dict):
        own = copy.copy(value)  # modules share it, but may need different numbers
        for field, number in list(vars(own).items()):
            if type(number) is int and not field.startswith("__"):
                vars(own)[field] = Tracked.attribute(f"{path}.{field}", number)
        return own
    return value


@dataclass(frozen=True, eq=False)
class Equation:
    """The value that a tracked number must become."""

    number: Tracked
    wanted: int

    def holds(self, environment: Environment) -> bool:
        """Whether the number has that value, for these values of attributes."""
        try:
            return self.number.formula(environment) == self.wanted
        except (ArithmeticError, ValueError):
            return False


_COUNTS = re.compile("heads?$|groups?$|^(n|num)_|_(n|num)_")
"""Names of counts. Where a count or the size of what it counts could change, the count does."""


def solve(changes: Iterable[Equation], stays: Iterable[Equation]) -> dict[str, int]:
    """Find new values of attributes with which numbers become what they must, and no other number changes.

    Attributes are tried one at a time. A value that makes a change true is kept, unless it contradicts a
    number that must stay, or a change that earlier attributes decide. Changes that no attribute explains are
    left for mending.
    """
    changes, stays = list(changes), list(stays)
    found: dict[str, int] = {}
    for equation in sorted(changes, key=lambda e: len(e.number.sources)):
        if equation.holds(found):
            continue
        options = sorted(equation.number.sources - set(found), key=lambda s: not _is_count(s))
        for source in options:
            value = _value(equation, source, found)
            if value is None:
                continue
            trial = {**found, source: value}
            decided = [e for e in changes if source in e.number.sources and e.number.sources <= set(trial)]
            bound = [e for e in stays if source in e.number.sources]
            if all(e.holds(trial) for e in (*decided, *bound)):
                found = trial
                break
    return found


def _is_count(source: str) -> bool:
    return bool(_COUNTS.search(source.rpartition(".")[2]))


def _value(equation: Equation, source: str, environment: Environment) -> int | None:
    """Return the value of an attribute that makes an equation true; None if no smaller value does."""
    try:
        present = equation.number.formula({**environment})
    except (ArithmeticError, ValueError):
        return None
    for value in range(max(present, int(equation.number), 1) + 1):
        if equation.holds({**environment, source: value}):
            return value
    return None
