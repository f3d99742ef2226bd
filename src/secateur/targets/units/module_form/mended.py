"""Mending: calls in the user's code get new sizes, where the code itself fixes the sizes.

Examples are ``x.reshape(B, N, C)`` with C read from the input, and ``x.new_full((16, 1, 1), 0.5)``: no
attribute makes such code use fewer units. The module keeps its class and its code. Its ``forward``, and each
other method with such a call, runs in a mode that changes the sizes in that call and leaves all other calls
as they are. So training mode, gradients, dtypes, devices and other sizes work as in the user's code.
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
from secateur.targets.units.copying import keep_whole
from secateur.targets.units.module_form import calls
from secateur.targets.units.module_form.attention import with_head_size
from secateur.targets.units.module_form.call_sizes import plain
from secateur.targets.units.module_form.needs import Factor, Heads, Need, Parts, Positions, Sizes, Step
from secateur.targets.units.module_form.recording import Place, literals, place_of


@dataclass(frozen=True)
class Rule:
    """What a call has to pass in the smaller model.

    Attributes:
        name: The function that is called.
        place: The place of the call in the code.
        steps: The steps of the call.
        needs: What steps need, each with the number of the step. Empty if the call stays as it is.
        passed: The numbers that the code passes and that the rule changes.
        count: How many sizes the call passes.
    """

    name: str
    place: Place
    steps: tuple[Step, ...]
    needs: tuple[tuple[int, Need], ...]
    passed: tuple[int, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class Code:
    """What is known about the calls in a module's code.

    Attributes:
        rules: The rules of its calls with sizes, as far as they ran when the model was traced.
        sizes: The sizes of the dense module that have shrunk. Calls without a rule may not pass them.
        unseen: For each method, the lines that did not run and that contain one of these sizes, in words.
        plain: Whether the numbers that a call passes decide its rule, wherever the call is. A compiler knows
            the numbers, but not the place of a call.
    """

    rules: tuple[Rule, ...]
    sizes: frozenset[int] = frozenset()
    unseen: tuple[tuple[str, tuple[str, ...]], ...] = ()
    plain: bool = False

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The functions whose calls are checked. Products are many, so only those with a rule are."""
        sized = {name for name, family in calls.FAMILIES.items() if family != "scale"}
        return frozenset(sized | {rule.name for rule in self.rules if rule.needs})


def passed_numbers(name: str, rule: Rule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the numbers of a call that a rule would change; none if the rule is for other kinds of calls."""
    if calls.count(name, args, dict(kwargs)) != rule.count:
        return ()
    if not _alike(calls.steps_of(name, args, dict(kwargs)), rule.steps):
        return ()
    pairs = [p for k, need in rule.needs for p in calls.wanted(name, rule.steps[k], need, args, dict(kwargs))]
    return tuple(calls.numbers(*(plain(number) for number, new in pairs if number is not new)))


def _as_traced(rule: Rule, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call passes the numbers of the trace. Sizes may differ: they are changed by a ratio."""
    following = all(isinstance(need, Sizes | Factor | Heads) for _, need in rule.needs)
    numbers = () if following else passed_numbers(name, rule, args, kwargs)
    return following or numbers == rule.passed or (not numbers and _are_listed(rule))


def _are_listed(rule: Rule) -> bool:
    """Whether positions are in a tensor or a list. A tensor that is exported has no numbers."""
    return any(isinstance(need, Positions) and need.listed is not None for _, need in rule.needs)


def _alike(steps: Sequence[Step], others: Sequence[Step]) -> bool:
    return [(s.family, s.part) for s in steps] == [(s.family, s.part) for s in others]


def line_of(place: Place) -> str:
    """Describe the place of a call: file, function and line."""
    if not place:
        return "an unknown line"
    file, function, _, line, _ = place[0]
    return f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}, {function} (line {line})"


def fitting_rules(
    rules: Iterable[Rule], name: str, place: Place, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Rule]:
    """Find the rules for a call, by its line; if they differ, by its place; then by the numbers it passes.

    There are none for a line that did not run when the model was traced. There are several different ones if
    none of these three decides between them.
    """
    found = [rule for rule in rules if rule.name == name and _line(rule.place) == _line(place)]
    for short in (0, 1):  # a compiler may change the numbers of instructions
        if _differ(found):
            stack = [frame[: len(frame) - short] for frame in place]
            found = [rule for rule in found if _is_same_stack(stack, rule.place, short)] or found
    if _differ(found):
        found = (
            rules_by_numbers(found, name, args, kwargs) or [rule for rule in found if not rule.needs] or found
        )
    return found


def rules_by_numbers(
    rules: Iterable[Rule], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Rule]:
    """Return the rules that change a call with the numbers that this call passes."""
    own = [rule for rule in rules if rule.name == name and rule.needs]
    return [rule for rule in own if passed_numbers(name, rule, args, kwargs) == rule.passed]


def _line(place: Place) -> tuple[Any, ...]:
    return place[0][:4] if place else ()


def _is_same_stack(stack: Sequence[tuple[Any, ...]], place: Place, short: int) -> bool:
    """Whether two stacks agree up to the end of the shorter one: a method may be called from outside."""
    return all(a == b[: len(b) - short] for a, b in zip(stack, place, strict=False))


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
    """Run a call, with its arguments changed to what its steps need."""
    for k, need in needs.items():
        if isinstance(need, Parts):
            return calls.split(need, args, kwargs)
        if isinstance(need, Heads):
            return with_head_size(need.size, args, kwargs)
        args, kwargs = calls.changed(name, steps[k], need, args, kwargs)
    return func(*args, **kwargs)


class _NoScript(ApplyError, AttributeError):
    """Raised where a mended module is scripted. To other code it is a missing attribute."""


F = TypeVar("F", bound=Callable[..., Any])
_WHY = "secateur mends sizes at lines of this code, which a compiler does not tell; call it without fullgraph"
_REASON = {"reason": _WHY} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
_uncompiled: Callable[[F], F] = functools.partial(torch.compiler.disable, **_REASON)


class MendedMethod:
    """Takes the place of a method of a module, such as ``forward``, and mends some of its calls.

    Attributes:
        module: The module.
        code: What is known of its code, as plain data.
        name: The name of the method.
    """

    def __init__(self, module: nn.Module, code: Code, name: str = "forward", inner: Any = None) -> None:
        self.module, self.code, self.name = module, code, name
        self._inner = inner  # the attribute that it replaces, if there was one

    def moved(self, module: nn.Module) -> MendedMethod:
        """Make a mended method for another module of the same class."""
        inner = self._inner.moved(module) if isinstance(self._inner, MendedMethod) else self._inner
        return MendedMethod(module, self.code, self.name, inner)

    def rounds(self) -> Iterator[MendedMethod]:
        """Return this object, and the mended methods of earlier rounds of pruning that it calls."""
        yield self
        if isinstance(self._inner, MendedMethod):
            yield from self._inner.rounds()

    @property
    def __wrapped__(self) -> Any:
        """The user's method, from which others read the signature."""
        return self._inner or getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __code__(self) -> Any:
        """The code of the user's method, from which `torch.export` reads the names of its arguments."""
        return self.__wrapped__.__code__

    @property
    def __globals__(self) -> Any:
        """Refuse `torch.jit.script`, which asks for this: it could only compile the code without mending.

        Raises:
            ApplyError: Always.
        """
        raise _NoScript(
            f"expected no torch.jit.script of {type(self.module).__name__}, got one: it compiles the code, "
            f"which has a size that is changed only as the code runs. Use torch.jit.trace or torch.export."
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
        caller = None if frame is None else frame.f_locals.get("owner")
        if isinstance(caller, MendedMethod) and caller.module is self.module:
            if all(one is not self for one in caller.rounds()):
                return self.run(args, kwargs)  # the calling method mends it already
        return mended_call(self, args, kwargs)


def mended_call(owner: MendedMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the user's method, mended. `place_of` knows this function by its name."""
    with _Mending(owner):
        return owner.run(args, kwargs)


class _Plain(TorchFunctionMode):
    """Mends calls by the numbers they pass alone, which a compiler can follow."""

    def __init__(self, owner: MendedMethod) -> None:
        super().__init__()
        self._rules = owner.code.rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        rules = rules_by_numbers(self._rules, name, args, kwargs)
        if not rules:
            return func(*args, **kwargs)
        return mended(func, name, calls.steps_of(name, args, kwargs), dict(rules[0].needs), args, kwargs)


@dataclass
class Watch:
    """Observes over several runs whether the numbers that calls pass decide their rules.

    Attributes:
        passed: For each run, the numbers that calls passed, by module, place and rule.
        undecided: The ids of modules where the numbers would lead to another rule.
    """

    passed: list[dict[Any, set[tuple[int, ...]]]] = field(default_factory=list)
    undecided: set[int] = field(default_factory=set)

    def note(self, module: nn.Module, place: Place, known: Sequence[Rule], call: Any, rules: Any) -> None:
        """Record a call, the rules of its line, and those of its module."""
        needs = known[0].needs if known else ()
        for rule in (rule for rule in rules if rule.name == call[0] and rule.needs):
            numbers = passed_numbers(call[0], rule, *call[1:])
            self.passed[-1].setdefault((id(module), place, rule), set()).add(numbers)
            if numbers == rule.passed and rule.needs != needs:
                self.undecided.add(id(module))
        if needs and not rules_by_numbers(rules, *call):
            self.undecided.add(id(module))

    def plain(self, module: nn.Module, code: Code) -> bool:
        """Whether the numbers decide the rules of a module, do not vary, and none would be changed twice."""
        first: dict[Any, set[tuple[int, ...]]] = {}
        every = [item for run in self.passed for item in run.items()]
        varying = {key[0] for key, numbers in every if first.setdefault(key, numbers) != numbers}
        changing = [rule for rule in code.rules if rule.needs]
        if any(isinstance(need, Factor) for rule in changing for _, need in rule.needs):
            return False  # factors do not tell calls apart
        if any(map(_are_listed, changing)):
            return False  # a compiler does not see the positions in a tensor
        twice = any(a.name == b.name and set(_news(a)) & set(b.passed) for a in changing for b in changing)
        return not code.unseen and not twice and id(module) not in self.undecided | varying


def _news(rule: Rule) -> list[int]:
    """Return the numbers that a call passes after its rule was applied."""
    needs = [need for _, need in rule.needs]
    sizes = [new for need in needs if isinstance(need, Sizes) for _, _, new in need.axes]
    return sizes + calls.numbers(*(astuple(need) for need in needs if not isinstance(need, Sizes)))


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watching() -> Iterator[Watch]:
    """Inside, calls of mended modules are recorded."""
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
        caller = None if frame is None else frame.f_locals.get("owner")
        own = any(one is caller for one in self._owner.rounds())
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
                f"{line_of(place)}: expected {name} to be given {rules[0].passed}, as in the trace, got "
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
        """Refuse a call on a line that did not run at trace, if it passes a size that shrank here."""
        # The size may be in the function of the call, on lines that lead there, or in an attribute.
        names = {name for code in codes for name in code.co_names}
        attributes = {v for k, v in vars(self._owner.module).items() if isinstance(v, int) and k in names}
        outer = (literals(code, frame[3]) for code, frame in zip(codes[1:], place[1:], strict=True))
        written = attributes.union(*map(literals, codes[:1]), *outer)
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
    """Mend the calls of modules from now on, in place, and refuse lines that did not run at trace.

    Returns:
        The paths of the modules that are mended.
    """
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
    """Return the names of ``forward`` and of other methods with calls that are mended."""
    found = {"forward"}
    for frame in (frame for rule in rules if rule.needs for frame in rule.place):
        method = inspect.getattr_static(type(module), frame[1], None)
        if isinstance(method, FunctionType) and not frame[1].startswith("__"):
            code = inspect.unwrap(method).__code__
            if (code.co_filename, code.co_firstlineno) == (frame[0], frame[2]):
                found.add(frame[1])
    return found
