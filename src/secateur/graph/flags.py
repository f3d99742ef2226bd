"""Flags: plain attributes that a model's code reads, by which a user may choose other code after a trace."""

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
        held = {id(owner): (owner, name) for owner, name in owners if owner is not None}
        before = [(owner, name, _own_attributes(owner).get(name, _MISSING)) for owner, name in held.values()]
        try:
            for owner, name in held.values():
                _set(owner, name, self.value)
            yield
        finally:
            for owner, name, value in before:
                if value is _MISSING:
                    vars(owner).pop(name, None)
                else:
                    _set(owner, name, value)


def _slots(owner: Any) -> list[str]:
    """Return the names for which an object has slots in the place of a dictionary."""
    held = ((name, value) for kind in type(owner).__mro__ for name, value in vars(kind).items())
    return [name for name, value in held if isinstance(value, MemberDescriptorType)]


def _own_attributes(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object itself, in its dictionary and in slots."""
    filled = {name: getattr(owner, name) for name in _slots(owner) if hasattr(owner, name)}
    return filled | getattr(owner, "__dict__", {})


def _set(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, past any code that watches over that."""
    if name in _slots(owner):
        inspect.getattr_static(owner, name).__set__(owner, value)
    else:
        vars(owner)[name] = value


def _has_attributes(owner: Any) -> bool:
    return hasattr(owner, "__dict__") or bool(is_own(type(owner).__module__) and _slots(owner))


def _owner(model: nn.Module, reader: Reader) -> Any:
    """Return the object that holds a flag; None if there is none."""
    owner: Any = model.get_submodule(reader.path)
    for name in reader.chain[:-1]:
        owner = getattr(owner, name, None)
    return owner if _has_attributes(owner) else None


def value_of(module: nn.Module, chain: Chain) -> Any:
    """Return what a module reads by these names; None if there is nothing."""
    held: Any = module
    for name in chain:
        held = getattr(held, name, None)
    return held


def plain_attributes(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object, and of its class, that are plain values, by name."""
    kinds = (vars(kind) for kind in reversed(type(owner).__mro__) if is_own(kind.__module__))
    held = {name: value for names in (*kinds, _own_attributes(owner)) for name, value in names.items()}
    plain = {k: v for k, v in held.items() if isinstance(v, (*_PLAIN, enum.Enum))}
    return {k: v for k, v in plain.items() if k not in _OWN and k[:2] != "__"}


def attributes_of(model: nn.Module) -> dict[Reader, Any]:
    """Return all plain attributes of a model's modules, and of objects such as configurations in these."""
    found: dict[Reader, Any] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        found.update((Reader(path, (name,)), value) for name, value in plain_attributes(module).items())
        for name, held in vars(module).items():
            own = isinstance(held, SimpleNamespace) or is_own(type(held).__module__)
            if own and id(held) not in seen and _has_attributes(held):
                seen.add(id(held))
                items = {} if isinstance(held, nn.Module | type) else plain_attributes(held)
                found.update((Reader(path, (name, key)), value) for key, value in items.items())
    return found


def changed(model: nn.Module, before: Mapping[Reader, Any]) -> list[Flag]:
    """Return the attributes that have other values than before, as flags with their value from before."""
    now = attributes_of(model)
    pairs = ((reader, value, now[reader]) for reader, value in before.items() if reader in now)
    return [
        Flag((r,), old, (new,)) for r, old, new in pairs if (type(old), repr(old)) != (type(new), repr(new))
    ]


def flags_of(model: nn.Module, run: Callable[[], Any]) -> list[Flag]:
    """Return the values that flags of a model may get, as far as the code that runs names them.

    A bool gets the other value, a member of an enumeration each other member. A string, a number or None gets
    those that the code compares it with; a number also those next to them, and what is false in its place.
    Only code of the user's and of libraries of models is read, and only attributes without a setter count.

    Args:
        model: The model.
        run: Runs it.
    """
    found: dict[tuple[type, str, Any], list[tuple[Reader, Any]]] = {}
    read_by = functools.cache(_read)  # equal layers share their code
    for path, variable, code in _ran(model, run):
        for chain, compared in read_by(code, variable).items():
            reader = Reader(path, chain)
            owner, name = _owner(model, reader), chain[-1]
            if owner is None or name in _OWN or not _is_plain_attribute(owner, name):
                continue
            now = getattr(owner, name)
            for value in _others(now, compared):
                found.setdefault((type(owner), name, (type(value), value)), []).append((reader, now))
    flags = [
        Flag(tuple(held := dict(read)), value, tuple(held.values()))
        for (_, _, (_, value)), read in found.items()
    ]
    return flags[:MOST]


def _ran(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, str, CodeType]]:
    """Return the code that runs with modules of the model as arguments: path, name of the argument, code."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[tuple[str, str, CodeType], None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and is_own(frame.f_globals.get("__name__")):
            held = frame.f_locals
            for name in code.co_varnames[: code.co_argcount]:
                path = paths.get(id(held.get(name)))
                if path is not None:
                    found[path, name, code] = None

    with profiled(note):
        run()
    return list(found)


def _is_plain_attribute(owner: Any, name: str) -> bool:
    held = inspect.getattr_static(owner, name, _MISSING)
    if isinstance(held, MemberDescriptorType):
        held = getattr(owner, name, _MISSING)
    return isinstance(held, (*_PLAIN, enum.Enum))


def _others(now: Any, compared: Sequence[Any]) -> list[Any]:
    """Return further values of an attribute, by what the code compares it with."""
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
    for one in _codes(code):
        _note(one, variable, found)
    return {chain: tuple(compared) for chain, compared in found.items()}


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of those inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _note(code: CodeType, own: str, found: dict[Chain, dict[Any, None]]) -> None:
    """Add the attributes that code reads of its module, which it calls `own`."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "COPY", "NOP")]
    written = [_constants(i) for i in steps]
    compared = [
        value
        for k, step in enumerate(steps[1:])
        if step.opname in ("COMPARE_OP", "CONTAINS_OP", "IS_OP")
        for value in written[k]
    ]
    texts = {value: None for value in compared if isinstance(value, str)}
    chain: list[str] | None = None
    for k, step in enumerate(steps):
        if chain is not None and step.opname.startswith(_MEMBERS):
            chain.append(str(step.argval))
            continue
        if chain:
            values = found.setdefault(tuple(chain), {})
            beside = steps[k + 1].opname if k + 1 < len(steps) else ""
            if beside in ("COMPARE_OP", "CONTAINS_OP", "IS_OP"):
                values.update(dict.fromkeys(v for v in written[k] if not isinstance(v, str)))
            elif "JUMP" in step.opname or step.opname in ("TO_BOOL", "UNARY_NOT"):
                values[0] = None
            values.update(texts)  # a string may be compared under another name
        chain = [] if _loads(step, own) else None


def _loads(step: dis.Instruction, own: str) -> bool:
    """Whether an instruction ends by putting this variable on the stack."""
    last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
    return step.opname.startswith(_LOADS) and last == own


def _constants(step: dis.Instruction) -> list[Any]:
    """Return the plain values that an instruction loads, also those in a tuple or set."""
    if "CONST" not in step.opname and "SMALL_INT" not in step.opname:
        return []
    held = step.argval if isinstance(step.argval, tuple | frozenset) else (step.argval,)
    return [value for value in held if isinstance(value, _PLAIN)]
