"""Sizes that the user's code holds as numbers, mended at the call that uses them.

``x.reshape(B, N, C)`` with C read off the input, ``x.new_full((16, 1, 1), 0.5)``: no attribute makes such
code take fewer units. The module keeps its class and its code. Its ``forward``, and each other method that
holds such a call, runs with a mode that gives the call its new size, and leaves all others alone. So training
mode, gradients, dtypes, devices and other sizes are what the user's code makes of them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, field
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.errors import ApplyError, InputError
from secateur.targets.units import calls
from secateur.targets.units.attention import with_head_size
from secateur.targets.units.copying import keep_whole
from secateur.targets.units.needs import Factor, Heads, Need, Parts, Sizes, Step
from secateur.targets.units.recording import Place, literals, place_of


@dataclass(frozen=True)
class Rule:
    """What a call has to say.

    Attributes:
        name: The function that is called.
        place: Where the call stands.
        steps: The steps of the call.
        needs: What steps have to say, each with the number of the step; empty if the call stays as it is.
        said: The numbers in its arguments that change, as the code says them.
        count: How many sizes it has.
    """

    name: str
    place: Place
    steps: tuple[Step, ...]
    needs: tuple[tuple[int, Need], ...]
    said: tuple[int, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class Code:
    """What is known of a module's code.

    Attributes:
        rules: What its sized calls have to say, of those that ran when the model was traced.
        sizes: The sizes of the dense module that have shrunk: no other call may say them.
        unseen: By method, the lines that did not run and say one of them, in words.
        plain: Whether what a call says is enough to know its rule, wherever it stands: a compiler knows no
            more.
    """

    rules: tuple[Rule, ...]
    sizes: frozenset[int] = frozenset()
    unseen: tuple[tuple[str, tuple[str, ...]], ...] = ()
    plain: bool = False

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The functions whose calls are looked at: products are many, and only those with a rule count."""
        sized = {name for name, family in calls.FAMILIES.items() if family != "scale"}
        return frozenset(sized | {rule.name for rule in self.rules if rule.needs})


def said(name: str, rule: Rule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of a call that a rule would change; none for a call of other steps or more sizes."""
    if calls.count(name, args, dict(kwargs)) != rule.count:
        return ()
    if not _alike(calls.steps_of(name, args, dict(kwargs)), rule.steps):
        return ()
    pairs = [p for k, need in rule.needs for p in calls.wanted(name, rule.steps[k], need, args, dict(kwargs))]
    return tuple(calls.numbers(*(calls.plain(number) for number, new in pairs if number is not new)))


def _as_traced(rule: Rule, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call says what was replaced in it; sizes may be others, which follow by their ratio."""
    following = all(isinstance(need, Sizes | Factor | Heads) for _, need in rule.needs)
    return following or said(name, rule, args, kwargs) == rule.said


def _alike(steps: Sequence[Step], others: Sequence[Step]) -> bool:
    return [(s.family, s.part) for s in steps] == [(s.family, s.part) for s in others]


def line_of(place: Place) -> str:
    """Where a call stands, in words."""
    if not place:
        return "an unknown line"
    file, function, _, line, _ = place[0]
    return f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}, {function} (line {line})"


def fitting_rules(
    rules: Iterable[Rule], name: str, place: Place, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Rule]:
    """The rules for a call: those of its line; where they differ, of its place; then by what the call says.

    They are empty for a line that did not run when the model was traced, and differ if nothing decides.
    """
    found = [rule for rule in rules if rule.name == name and _line(rule.place) == _line(place)]
    for short in (0, 1):  # instructions have other numbers in code that a compiler has rewritten
        if _differ(found):
            ours = [frame[: len(frame) - short] for frame in place]
            found = [rule for rule in found if _meet(ours, rule.place, short)] or found
    if _differ(found):
        found = told(found, name, args, kwargs) or [rule for rule in found if not rule.needs] or found
    return found


def told(rules: Iterable[Rule], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Rule]:
    """The rules that change a call which says what this one says."""
    ours = [rule for rule in rules if rule.name == name and rule.needs]
    return [rule for rule in ours if said(name, rule, args, kwargs) == rule.said]


def _line(place: Place) -> tuple[Any, ...]:
    return place[0][:4] if place else ()


def _meet(ours: Sequence[tuple[Any, ...]], place: Place, short: int) -> bool:
    """Whether two stacks are one as far as both go: a method may be called from outside."""
    return all(a == b[: len(b) - short] for a, b in zip(ours, place, strict=False))


def _differ(rules: Sequence[Rule]) -> bool:
    return any(rule.needs != rules[0].needs for rule in rules)


def mended(
    func: Any,
    name: str,
    steps: Sequence[Step],
    needs: Mapping[int, Need],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Carry out a call with what its steps need."""
    for k, need in needs.items():
        if isinstance(need, Parts):
            return calls.split(need, args, kwargs)
        if isinstance(need, Heads):
            return with_head_size(need.size, args, kwargs)
        args, kwargs = calls.changed(name, steps[k], need, args, kwargs)
    return func(*args, **kwargs)


class _NoScript(ApplyError, AttributeError):
    """A mended module cannot be scripted. To all others who ask, there is no such attribute."""


F = TypeVar("F", bound=Callable[..., Any])
_WHY = "secateur mends sizes at lines of this code, which a compiler does not tell; call it without fullgraph"
_REASON = {"reason": _WHY} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
_uncompiled: Callable[[F], F] = functools.partial(torch.compiler.disable, **_REASON)


class MendedMethod:
    """A method of a module some of whose calls are mended: ``forward``, or another that makes such calls.

    Attributes:
        module: The module.
        code: What is known of its code, as plain data.
        name: The method.
    """

    def __init__(self, module: nn.Module, code: Code, name: str = "forward", inner: Any = None) -> None:
        self.module, self.code, self.name = module, code, name
        self._inner = inner  # what stood in its place before: an earlier round's, or somebody else's

    def moved(self, module: nn.Module) -> MendedMethod:
        """The same for another module of the same class."""
        inner = self._inner.moved(module) if isinstance(self._inner, MendedMethod) else self._inner
        return MendedMethod(module, self.code, self.name, inner)

    def rounds(self) -> Iterator[MendedMethod]:
        """This, and the same method as earlier rounds mended it."""
        yield self
        if isinstance(self._inner, MendedMethod):
            yield from self._inner.rounds()

    @property
    def __wrapped__(self) -> Any:
        """The user's method, for whoever asks for its signature."""
        return self._inner or getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __code__(self) -> Any:
        """The code of the user's method: `torch.export` reads the names of its arguments there."""
        return self.__wrapped__.__code__

    @property
    def __globals__(self) -> Any:
        """What `torch.jit.script` asks for first, and it can only compile the user's code as it stands.

        Raises:
            ApplyError: Always.
        """
        raise _NoScript(
            f"expected no torch.jit.script of {type(self.module).__name__}, got one: it compiles the code, "
            f"which holds a size that is mended as the code runs. Use torch.jit.trace or torch.export."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's method, mended."""
        if self.code.plain and torch.compiler.is_dynamo_compiling():
            with _Plain(self):
                return self.run(args, kwargs)
        return self._placed(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the user's method."""
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    @_uncompiled
    def _placed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, _, frame = place_of(sys._getframe(1))
        around = None if frame is None else frame.f_locals.get("owner")
        if isinstance(around, MendedMethod) and around.module is self.module:
            if all(one is not self for one in around.rounds()):
                return self.run(args, kwargs)  # mended by the method that calls it
        return mended_call(self, args, kwargs)


def mended_call(owner: MendedMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the user's method, mended. `place_of` knows this function by its name."""
    with _Mending(owner):
        return owner.run(args, kwargs)


class _Plain(TorchFunctionMode):
    """Mends calls by what they say alone: a compiler can follow it."""

    def __init__(self, owner: MendedMethod) -> None:
        super().__init__()
        self._rules = owner.code.rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        rules = told(self._rules, name, args, kwargs)
        if not rules:
            return func(*args, **kwargs)
        return mended(func, name, calls.steps_of(name, args, kwargs), dict(rules[0].needs), args, kwargs)


@dataclass
class Watch:
    """Whether rules follow from what calls say, over several runs.

    Attributes:
        said: For each run, by a module's identity, a place and a rule: the numbers that calls said there.
        apart: Modules where another rule would follow, by identity.
    """

    said: list[dict[Any, set[tuple[int, ...]]]] = field(default_factory=list)
    apart: set[int] = field(default_factory=set)

    def note(self, module: nn.Module, place: Place, known: Sequence[Rule], call: Any, rules: Any) -> None:
        """Note a call, the rules of its line, and those of its module."""
        needs = known[0].needs if known else ()
        for rule in (rule for rule in rules if rule.name == call[0] and rule.needs):
            numbers = said(call[0], rule, *call[1:])
            self.said[-1].setdefault((id(module), place, rule), set()).add(numbers)
            if numbers == rule.said and rule.needs != needs:
                self.apart.add(id(module))
        if needs and not told(rules, *call):
            self.apart.add(id(module))

    def plain(self, module: nn.Module, code: Code) -> bool:
        """Whether rules follow, no number that tells calls apart varies, and none would change twice."""
        first: dict[Any, set[tuple[int, ...]]] = {}
        every = [item for run in self.said for item in run.items()]
        varying = {key[0] for key, numbers in every if first.setdefault(key, numbers) != numbers}
        changing = [rule for rule in code.rules if rule.needs]
        if any(isinstance(need, Factor) for rule in changing for _, need in rule.needs):
            return False  # a factor is no size that would tell its call apart
        twice = any(a.name == b.name and set(_news(a)) & set(b.said) for a in changing for b in changing)
        return not code.unseen and not twice and id(module) not in self.apart | varying


def _news(rule: Rule) -> list[int]:
    """The numbers that a rule's call says afterwards."""
    needs = [need for _, need in rule.needs]
    sizes = [new for need in needs if isinstance(need, Sizes) for _, _, new in need.axes]
    return sizes + calls.numbers(*(astuple(need) for need in needs if not isinstance(need, Sizes)))


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watching() -> Iterator[Watch]:
    """Inside, calls of mended modules are noted."""
    watch = Watch()
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


class _Mending(TorchFunctionMode):
    def __init__(self, owner: MendedMethod) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in self._owner.code.names:
            return func(*args, **kwargs)
        every = self._owner.code.rules
        place, codes, frame = place_of(sys._getframe(1))
        around = None if frame is None else frame.f_locals.get("owner")
        own = any(one is around for one in self._owner.rounds())
        rules = fitting_rules(every, name, place, args, kwargs) if own else []
        if (watch := _watch.get()) is not None:
            watch.note(self._owner.module, place, rules, (name, args, kwargs), every)
        if not own:
            return func(*args, **kwargs)
        if not rules:
            self._check_unknown(name, place, codes, args, kwargs)
        if not any(rule.needs for rule in rules):
            return func(*args, **kwargs)
        steps = calls.steps_of(name, args, kwargs)
        if _differ(rules) or not _alike(steps, rules[0].steps):
            raise InputError(
                f"{line_of(place)}: expected a call of {name} as when the model was traced, got one with "
                f"other sizes. {_ADVICE}"
            )
        if not any(_as_traced(rule, name, args, kwargs) for rule in rules):
            raise InputError(
                f"{line_of(place)}: expected {name} to say {rules[0].said} as when the model was traced, got "
                f"other numbers, and a size that has shrunk is among them. {_ADVICE}"
            )
        try:
            return mended(func, name, steps, dict(rules[0].needs), args, kwargs)
        except ValueError as error:
            raise ApplyError(
                f"{line_of(place)}: {error}. This size cannot follow what was removed."
            ) from error

    def _check_unknown(
        self, name: str, place: Place, codes: list[CodeType], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Raise InputError for a call on a line that did not run at trace, with a size that shrank here."""
        # It may be written in its function, on the lines that lead there, or in attributes named there.
        names = {name for code in codes for name in code.co_names}
        held = {v for k, v in vars(self._owner.module).items() if isinstance(v, int) and k in names}
        outer = (literals(code, frame[3]) for code, frame in zip(codes[1:], place[1:], strict=True))
        written = held.union(*map(literals, codes[:1]), *outer)
        if found := self._owner.code.sizes & written & set(calls.numbers(args, dict(kwargs))):
            raise InputError(
                f"{line_of(place)}: expected only lines that ran when the model was traced, got a call of "
                f"{name} with {min(found)}, a size that has shrunk here. {_ADVICE}"
            )


_ADVICE = (
    "Trace with inputs that run this line (an optional argument, methods=...), or leave the group alone "
    "(Limits(ignore=...))."
)


def mend(small: nn.Module, codes: Mapping[str, Code]) -> tuple[str, ...]:
    """Let modules run mended, and refuse lines that did not run at trace; in place. Returns mended paths."""
    paths = []
    for path, code in codes.items():
        module = small.get_submodule(path)
        names = {name for name, _ in code.unseen}
        if any(rule.needs for rule in code.rules):
            names |= _methods(module, code.rules)
            paths.append(path)
        for name in sorted(names):
            setattr(module, name, MendedMethod(module, code, name, vars(module).get(name)))
        if names:
            keep_whole(module)
    return tuple(sorted(paths))


def _methods(module: nn.Module, rules: Iterable[Rule]) -> set[str]:
    """``forward``, and the other methods of a module that make calls which are mended."""
    found = {"forward"}
    for frame in (frame for rule in rules if rule.needs for frame in rule.place):
        method = inspect.getattr_static(type(module), frame[1], None)
        if isinstance(method, FunctionType) and not frame[1].startswith("__"):
            code = inspect.unwrap(method).__code__
            if (code.co_filename, code.co_firstlineno) == (frame[0], frame[2]):
                found.add(frame[1])
    return found
