"""Flags: plain attributes that a model's code reads. Setting one after a trace may choose other code."""

from __future__ import annotations

import dis
import enum
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType, MemberDescriptorType, SimpleNamespace
from typing import Any

from torch import nn

from secateur.common.preserving import is_own
from secateur.graph.frames import codes_in
from secateur.graph.modes import profiled

MOST = 48
"""The most values of flags that are tried: each costs a forward pass."""

_PLAIN = (bool, int, float, str, type(None))
_LOADS, _MEMBERS = ("LOAD_FAST", "LOAD_DEREF"), ("LOAD_ATTR", "LOAD_METHOD")
_OWN = frozenset(vars(nn.Module()))
_MISSING = object()

Chain = tuple[str, ...]
"""The names that lead from a module to a value: ``("config", "pooled")`` is for ``self.config.pooled``."""


@dataclass(frozen=True)
class Reader:
    """A module whose code reads a flag: its path in the model, and the names from it to the flag."""

    path: str
    chain: Chain

    def __str__(self) -> str:
        """Name the flag from the model on: ``model.encoder.config.pooled``."""
        return ".".join(["model", *(self.path.split(".") if self.path else ()), *self.chain])


@dataclass(frozen=True)
class Flag:
    """A value that a flag may get: the same one wherever the code of one class reads it.

    Attributes:
        readers: The modules that read it.
        value: The value, another one than now.
        now: What each reader reads now.
    """

    readers: tuple[Reader, ...]
    value: Any
    now: tuple[Any, ...]

    def __str__(self) -> str:
        """Say what is set: ``model.pooled = True``."""
        return f"{self.readers[0]} = {self.value!r}"

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Inside, the flag has this value everywhere."""
        owners = [(_owner(model, reader), reader.chain[-1]) for reader in self.readers]
        distinct = {id(owner): (owner, name) for owner, name in owners if owner is not None}.values()
        before = [(owner, name, _own_attributes(owner).get(name, _MISSING)) for owner, name in distinct]
        try:
            for owner, name in distinct:
                _set(owner, name, self.value)
            yield
        finally:
            for owner, name, value in before:
                if value is _MISSING:
                    vars(owner).pop(name, None)
                else:
                    _set(owner, name, value)


def _slots(owner: Any) -> list[str]:
    """Return the names of an object's slots (``__slots__``)."""
    members = ((name, value) for kind in type(owner).__mro__ for name, value in vars(kind).items())
    return [name for name, value in members if isinstance(value, MemberDescriptorType)]


def _own_attributes(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object itself, in its dictionary and in slots."""
    filled = {name: getattr(owner, name) for name in _slots(owner) if hasattr(owner, name)}
    return filled | getattr(owner, "__dict__", {})


def _set(owner: Any, name: str, value: Any) -> None:
    """Set an attribute without running any setter."""
    if name in _slots(owner):
        inspect.getattr_static(owner, name).__set__(owner, value)
    else:
        vars(owner)[name] = value


def _has_attributes(owner: Any) -> bool:
    return hasattr(owner, "__dict__") or bool(is_own(type(owner).__module__) and _slots(owner))


def _owner(model: nn.Module, reader: Reader) -> Any:
    """Return the object that has a flag as an attribute; None if there is none."""
    owner: Any = model.get_submodule(reader.path)
    for name in reader.chain[:-1]:
        owner = getattr(owner, name, None)
    return owner if _has_attributes(owner) else None


def value_of(module: nn.Module, chain: Chain) -> Any:
    """Return what a module reads by these names; None if there is nothing."""
    value: Any = module
    for name in chain:
        value = getattr(value, name, None)
    return value


def plain_attributes(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object, and of its class, that are plain values, by name."""
    kinds = (vars(kind) for kind in reversed(type(owner).__mro__) if is_own(kind.__module__))
    every = {name: value for names in (*kinds, _own_attributes(owner)) for name, value in names.items()}
    plain = {k: v for k, v in every.items() if isinstance(v, (*_PLAIN, enum.Enum))}
    return {k: v for k, v in plain.items() if k not in _OWN and k[:2] != "__"}


def attributes_of(model: nn.Module) -> dict[Reader, Any]:
    """Return all plain attributes of a model's modules, and of objects such as configurations in these."""
    found: dict[Reader, Any] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        found.update((Reader(path, (name,)), value) for name, value in plain_attributes(module).items())
        for name, value in vars(module).items():
            own = isinstance(value, SimpleNamespace) or is_own(type(value).__module__)
            if own and id(value) not in seen and _has_attributes(value):
                seen.add(id(value))
                items = {} if isinstance(value, nn.Module | type) else plain_attributes(value)
                found.update((Reader(path, (name, key)), inner) for key, inner in items.items())
    return found


def changed(model: nn.Module, before: Mapping[Reader, Any]) -> list[Flag]:
    """Return the attributes that have other values than before, as flags with their value from before."""
    now = attributes_of(model)
    pairs = ((reader, value, now[reader]) for reader, value in before.items() if reader in now)
    return [
        Flag((r,), old, (new,)) for r, old, new in pairs if (type(old), repr(old)) != (type(new), repr(new))
    ]


def flags_of(model: nn.Module, run: Callable[[], Any]) -> list[Flag]:
    """Return the values that a user may give to flags of a model, taken from the code that runs.

    For a bool this is the other value, for a member of an enumeration each other member. For a string, a
    number or None these are the constants that the code compares it with; for a number also their neighbours,
    and zero if the code asks whether it is true. Only the user's code and libraries of models are read, and
    only attributes without a setter count.

    Args:
        model: The model.
        run: Runs it.
    """
    found: dict[tuple[type, str, Any], list[tuple[Reader, Any]]] = {}
    read_by = functools.cache(_read)  # equal layers share their code
    for path, variable, code in _code_with_modules(model, run):
        for chain, compared in read_by(code, variable).items():
            reader = Reader(path, chain)
            owner, name = _owner(model, reader), chain[-1]
            if owner is None or name in _OWN or not _is_plain_attribute(owner, name):
                continue
            now = getattr(owner, name)
            for value in _others(now, compared):
                found.setdefault((type(owner), name, (type(value), value)), []).append((reader, now))
    flags = [
        Flag(tuple(now_by_reader := dict(read)), value, tuple(now_by_reader.values()))
        for (_, _, (_, value)), read in found.items()
    ]
    return flags[:MOST]


def _code_with_modules(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, str, CodeType]]:
    """Return the code that runs with modules of the model as arguments.

    Returns:
        Of each: the module's path, the name of the argument, and the code.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[tuple[str, str, CodeType], None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and is_own(frame.f_globals.get("__name__")):
            for name in code.co_varnames[: code.co_argcount]:
                path = paths.get(id(frame.f_locals.get(name)))
                if path is not None:
                    found[path, name, code] = None

    with profiled(note):
        run()
    return list(found)


def _is_plain_attribute(owner: Any, name: str) -> bool:
    value = inspect.getattr_static(owner, name, _MISSING)
    if isinstance(value, MemberDescriptorType):
        value = getattr(owner, name, _MISSING)
    return isinstance(value, (*_PLAIN, enum.Enum))


def _others(now: Any, compared: Sequence[Any]) -> list[Any]:
    """Return other values for an attribute, from its present one and the constants it is compared with."""
    if isinstance(now, bool):
        return [not now]
    if isinstance(now, enum.Enum):
        return [member for member in type(now) if member is not now]
    found: list[Any] = []
    for value in compared:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and isinstance(now, int | float):
            found += [value - 1, value, value + 1] if value else [value]
        elif type(value) is type(now) or value is None or (now is None and isinstance(value, str)):
            found.append(value)
    return [v for k, v in enumerate(found) if v != now and v not in found[:k]]


def _read(code: CodeType, variable: str) -> Mapping[Chain, tuple[Any, ...]]:
    """Return the attributes that code reads of a variable, each with the constants it is compared with."""
    found: dict[Chain, dict[Any, None]] = {}
    for one in codes_in(code):
        _note(one, variable, found)
    return {chain: tuple(compared) for chain, compared in found.items()}


def _note(code: CodeType, own: str, found: dict[Chain, dict[Any, None]]) -> None:
    """Add to `found` the attributes that code reads of the variable `own`: see `_read`."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "COPY", "NOP")]
    constants = [_constants(i) for i in steps]
    compared = [
        value
        for k, step in enumerate(steps[1:])
        if step.opname in ("COMPARE_OP", "CONTAINS_OP", "IS_OP")
        for value in constants[k]
    ]
    texts = {value: None for value in compared if isinstance(value, str)}
    chain: list[str] | None = None
    for k, step in enumerate(steps):
        if chain is not None and step.opname.startswith(_MEMBERS):
            chain.append(str(step.argval))
            continue
        if chain:
            values = found.setdefault(tuple(chain), {})
            after = steps[k + 1].opname if k + 1 < len(steps) else ""
            if after in ("COMPARE_OP", "CONTAINS_OP", "IS_OP"):
                values.update(dict.fromkeys(v for v in constants[k] if not isinstance(v, str)))
            elif "JUMP" in step.opname or step.opname in ("TO_BOOL", "UNARY_NOT"):
                values[0] = None
            values.update(texts)  # a string may be compared under another name
        chain = [] if _loads(step, own) else None


def _loads(step: dis.Instruction, own: str) -> bool:
    """Whether an instruction puts this variable on top of the stack."""
    last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
    return step.opname.startswith(_LOADS) and last == own


def _constants(step: dis.Instruction) -> list[Any]:
    """Return the plain values that an instruction loads, also those in a tuple or set."""
    if "CONST" not in step.opname and "SMALL_INT" not in step.opname:
        return []
    values = step.argval if isinstance(step.argval, tuple | frozenset) else (step.argval,)
    return [value for value in values if isinstance(value, _PLAIN)]
