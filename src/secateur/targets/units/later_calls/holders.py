"""What holds the values that a model's code reads beside tensors: attributes, containers, globals."""

from __future__ import annotations

import copy
import enum
import inspect
import sys
from collections import UserDict, deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from operator import is_
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any

from torch import Tensor, nn

from secateur.common.preserving import ATOMS, PLAIN, is_alike, is_own
from secateur.targets.units.later_calls.reachable import Reachable

NOTHING = ...
"""Stands for a value where there is none."""
DEEP, LONG = 3, 256
"""How far containers in containers are looked into, and the most entries of one."""
_OWN = frozenset((*vars(nn.Module()), "training", "use_cache", "_experts_implementation"))
"""Attributes that PyTorch or secateur sets."""
_CONTAINERS = nn.Sequential | nn.ModuleList | nn.ModuleDict
_HARMLESS = frozenset(("p", "inplace", "training"))


@dataclass(eq=False)
class Entry:
    """Values of one holder, as they were.

    Attributes:
        title: The holder, from the model on.
        kind: ``attribute``, ``slot``, ``class``, ``global``, ``dict``, ``list``, ``set``; or ``children`` of
            a module, to which others may be added, since no code names them.
        holder: The holder; of globals the name of the module of Python.
        values: The values by name, key or position. `NOTHING` where there is none.
        is_shared: Whether models have it in common, so that copies of a model refer to the same.
        absent: Names that an object lacks and that the code would read, were they there.
        ignored: Keys of a dictionary or list that are not looked at, as those of tensors.
    """

    title: str
    kind: str
    holder: Any
    values: dict[Any, Any]
    is_shared: bool = False
    absent: frozenset[str] = frozenset()
    ignored: frozenset[Any] = frozenset()
    _listed: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._listed = tuple(self.values.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        """Copy it for a copy of the model."""
        if self.is_shared:
            return self
        holder, values = copy.deepcopy(self.holder, memo), copy.deepcopy(self.values, memo)
        return Entry(self.title, self.kind, holder, values, absent=self.absent, ignored=self.ignored)

    @property
    def nothing(self) -> Any:
        """What stands for a value where there is none: of a set, whether something is in it."""
        return False if self.kind == "set" else NOTHING

    def now(self) -> Mapping[Any, Any]:
        """Return the present values, and perhaps others."""
        kind, holder = self.kind, self.holder
        if kind in ("dict", "list"):
            held = dict.items(holder) if kind == "dict" else enumerate(holder)
            return {
                k: v
                for k, v in held
                if k not in self.ignored and (k in self.values or not isinstance(v, Tensor))
            }
        if kind == "children":
            return dict(holder)
        if kind == "set":
            return dict.fromkeys(holder, True)
        if kind == "global":
            return vars(sys.modules[holder]) if holder in sys.modules else {}
        if kind == "slot":
            return {name: getattr(holder, name) for name in self.values if hasattr(holder, name)}
        return holder.__dict__  # type: ignore[no-any-return]

    def is_same(self) -> bool:
        """Whether nothing has changed."""
        kind, holder = self.kind, self.holder
        if kind == "set":
            return bool(holder == self.values.keys())
        if kind in ("dict", "list"):
            held = self.now().values() if self.ignored else dict.values(holder) if kind == "dict" else holder
            return len(held) == len(self.values) and all(map(is_, held, self.values.values()))
        now = holder.__dict__ if kind == "attribute" else holder if kind == "children" else self.now()
        for name, value in self._listed:
            if now.get(name, NOTHING) is not value:
                return False
        return not self.absent or self.absent.isdisjoint(self._all())

    def _all(self) -> AbstractSet[str]:
        """The names of all attributes of an object, and of a module's submodules."""
        own: dict[str, Any] = self.holder.__dict__
        children: dict[str, Any] | None = own.get("_modules")
        return own.keys() | children.keys() if children else own.keys()

    def changes(self) -> list[Change]:
        """Return what has changed. An equal value is kept as the one that there was."""
        now, kind = self.now(), self.kind
        names = list(self.values)
        if kind in ("dict", "list", "set"):
            names += now.keys() - self.values.keys()
        if self.absent:
            names += sorted(self._all() & self.absent)
        found = []
        for name in names:
            old, new = self.values.get(name, self.nothing), now.get(name, self.nothing)
            if kind == "attribute" and new is NOTHING and isinstance(self.holder, nn.Module):
                new = _tensor_or_module(self.holder, name)
            if old is new:
                continue
            if is_alike(old, new):
                self.accept(name, new)
            elif old is not NOTHING or not _wraps(new, self.holder, name):
                found.append(Change(self, name, old, new, len(now)))
        return found

    def accept(self, name: Any, value: Any) -> None:
        """Take a value as the one that there was."""
        self.values[name] = value
        self.absent -= {name}
        self._listed = tuple(self.values.items())

    def forget(self, name: Any) -> None:
        """Watch a value no longer, since the code writes it."""
        if self.kind in ("dict", "list", "set") and name not in self.values:  # one that grows
            self.kind, self.values, self.holder = "global", {}, ""  # which is always the same
        elif self.kind in ("dict", "list"):
            self.ignored |= {name}
        self.values.pop(name, None)
        self.absent -= {name}
        self._listed = tuple(self.values.items())


def _tensor_or_module(holder: nn.Module, name: str) -> Any:
    for held in (holder._modules, holder._parameters, holder._buffers):
        if name in held:
            return held[name]
    return NOTHING


def _wraps(value: Any, holder: Any, name: str) -> bool:
    """Whether a function wraps the method of the same name, as libraries do, or is one of secateur's own."""
    if not callable(value):
        return False
    inner = inspect.unwrap(value)
    elsewhere = getattr(inner, "__self__", holder) is not holder  # the method of another module
    inner = getattr(inner, "__func__", inner)
    own = (getattr(inner, "__module__", None) or "").partition(".")[0] == __name__.partition(".")[0]
    return own or (not elsewhere and inner is getattr(type(holder), name, NOTHING))


@dataclass(frozen=True, eq=False)
class Change:
    """A value that is another one than it was."""

    entry: Entry
    name: Any
    old: Any
    new: Any
    size: int = 0
    """How many values the holder has."""

    def __str__(self) -> str:
        """Name what holds the value, from the model on."""
        entry = self.entry
        if entry.kind == "set":
            return f"{self.name!r} in {entry.title}"
        if entry.kind in ("dict", "list") and not entry.title.endswith("._modules"):
            return f"{entry.title}[{self.name!r}]"
        return f"{entry.title.removesuffix('._modules')}.{self.name}"

    def before(self) -> Any:
        """Return the old value: that of the class, where the object had none of its own."""
        if self.old is not NOTHING or self.entry.kind != "attribute":
            return self.old
        return getattr(type(self.entry.holder), self.name, NOTHING)

    def is_new(self) -> bool:
        """Whether the value was not taken as the one that there was."""
        return self.entry.values.get(self.name, self.entry.nothing) is not self.new

    def is_overwritten(self) -> bool:
        """Whether it is another one by now, or has got neighbours, as in a list to which the code appends."""
        kind = self.entry.kind
        more = kind in ("dict", "list", "set") and len(self.entry.now()) != self.size
        return self._held() is not self.new or more

    def is_there_again(self) -> bool:
        """Whether the new value is there, or an equal plain one, after the old one was set."""
        return is_alike(self._held(), self.new)

    def _held(self) -> Any:
        entry = self.entry
        held = entry.now().get(self.name, entry.nothing)
        if held is NOTHING and isinstance(entry.holder, nn.Module):
            held = _tensor_or_module(entry.holder, self.name)
        return held

    def put(self, value: Any) -> None:
        """Set the old or the new value."""
        holder, name, kind = self.entry.holder, self.name, self.entry.kind
        if kind == "list":
            holder.extend([NOTHING] * (name + 1 - len(holder)))
            holder[name] = value
            while holder and holder[-1] is NOTHING:
                holder.pop()
        elif kind == "set":
            (holder.add if value else holder.discard)(name)
        elif kind in ("class", "slot"):
            delattr(holder, name) if value is NOTHING else setattr(holder, name, value)
        else:
            held = (
                holder
                if kind in ("dict", "children")
                else vars(sys.modules[holder] if kind == "global" else holder)
            )
            if kind == "attribute" and isinstance(holder, nn.Module):
                for tensors in (holder._modules, holder._parameters, holder._buffers):
                    tensors.pop(name, None)
                if isinstance(value, nn.Module):
                    held = holder._modules
            if value is NOTHING:
                held.pop(name, None)
            else:
                held[name] = value


def entries_of(model: nn.Module) -> list[Entry]:
    """Return what the code of a model reads beside tensors, by what holds it.

    All code counts that the forward pass may reach, by the names that it calls. What this code sets itself
    is left out. Globals are watched that hold plain values, containers, functions and classes.
    """
    return _Finder(model).found


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.found: list[Entry] = []
        self._seen: set[int] = set()
        self._of_kind: dict[type, tuple[set[str], frozenset[str]]] = {}
        self._reach = reach = Reachable(model)
        for path, module in model.named_modules():
            title = ".".join(filter(None, ("model", path)))
            if module._modules:
                kind = "dict" if isinstance(module, _CONTAINERS) else "children"
                self.found.append(Entry(f"{title}._modules", kind, module._modules, dict(module._modules)))
            if any(is_own(kind.__module__) for kind in type(module).__mro__[:-2]):
                self._object(title, module, 0, shared=False)
            else:
                bare = next(module.parameters(), None) is None
                values, absent = _public(module) if bare else {}, frozenset({"forward"} - vars(module).keys())
                self._add(title, "attribute", module, values, 0, shared=False, absent=absent)
        for name, names in reach.globals.items():
            held = vars(sys.modules[name])
            values = {k: held.get(k, NOTHING) for k in names if _may_change(held.get(k))}
            self._add(f"the global {name}", "global", name, values, 0, shared=True)

    def _object(self, title: str, holder: Any, steps: int, *, shared: bool) -> None:
        """Add the attributes of an object that the code reads, and those of its class."""
        reach, held, kind = self._reach, getattr(holder, "__dict__", {}), type(holder)
        if kind not in self._of_kind:
            self._of_kind[kind] = _own_names(kind, reach)
        stored, asked = self._of_kind[kind]
        names = [k for k in held if k in reach.names and k not in stored]
        values = {k: held[k] for k in names if not isinstance(held[k], Tensor | nn.Module)}
        absent = frozenset[str]()
        if hasattr(holder, "__dict__"):
            inside = [held.get(name, {}) for name in ("_modules", "_parameters", "_buffers")]
            absent = asked.difference(held, *inside)
        self._add(title, "attribute", holder, values, steps, shared=shared, absent=absent)
        for kind in type(holder).__mro__:
            if not is_own(kind.__module__):
                continue
            of_class = {k: v for k, v in vars(kind).items() if k in reach.names and k[:2] != "__"}
            slots = [k for k, v in of_class.items() if isinstance(v, MemberDescriptorType)]
            filled = {k: getattr(holder, k) for k in slots if hasattr(holder, k) and k not in stored}
            self._add(title, "slot", holder, filled, steps, shared=shared)
            if id(kind) not in self._seen:
                self._seen.add(id(kind))
                rest = {k: v for k, v in of_class.items() if _may_change(v) and k not in held}
                self._add(f"the class {kind.__name__}", "class", kind, rest, steps, shared=True)

    def _add(
        self,
        title: str,
        kind: str,
        holder: Any,
        values: dict[Any, Any],
        steps: int,
        *,
        shared: bool,
        absent: frozenset[str] = frozenset(),
        ignored: frozenset[Any] = frozenset(),
    ) -> None:
        if values or absent or kind in ("dict", "list", "set"):
            self.found.append(Entry(title, kind, holder, values, shared, absent, ignored))
        for name, value in values.items() if kind != "set" else ():
            inner = f"{title}[{name!r}]" if kind in ("dict", "list") else f"{title}.{name}"
            self._value(inner, value, steps + 1, shared=shared)

    def _value(self, title: str, value: Any, steps: int, *, shared: bool) -> None:
        if type(value) in ATOMS or steps > DEEP or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict | list | deque | set) and len(value) > LONG:
            return
        if isinstance(value, set):
            self._add(title, "set", value, dict.fromkeys(value, True), steps, shared=shared)
        elif isinstance(value, dict | list | deque):
            kind = "dict" if isinstance(value, dict) else "list"
            values = dict(dict.items(value) if isinstance(value, dict) else enumerate(value))
            tensors = frozenset(k for k, v in values.items() if isinstance(v, Tensor))
            rest = {k: v for k, v in values.items() if k not in tensors}
            self._add(title, kind, value, rest, steps, shared=shared, ignored=tensors)
        elif isinstance(value, tuple):
            for position, one in enumerate(value[:LONG]):
                self._value(f"{title}[{position}]", one, steps, shared=shared)
        elif isinstance(value, PLAIN) or (
            is_own(type(value).__module__)
            and not isinstance(value, type | nn.Module | enum.Enum | FunctionType)
        ):
            if isinstance(value, UserDict):
                self._value(title, value.data, steps, shared=shared)
            self._object(title, value, steps, shared=shared)


def _own_names(kind: type, reach: Reachable) -> tuple[set[str], frozenset[str]]:
    """Return the names that an object's own code sets, and those that code would read if the object had them.

    Attributes of the object stand in front of those of its class: methods, and values for all objects. But
    not in front of properties.
    """
    stored = reach.stored | reach.stored_by(kind) | _OWN
    of_class = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    mine = {name for base in kind.__mro__ if is_own(base.__module__) for name in vars(base)} & reach.names
    asked = {"forward"} if issubclass(kind, nn.Module) else set[str]()
    asked |= {
        name for name in mine if _may_change(of_class[name]) or isinstance(of_class[name], staticmethod)
    }
    asked |= {name for name in reach.asked if name not in of_class}
    return stored, frozenset(name for name in asked - stored if name[:2] != "__")


def _public(module: nn.Module) -> dict[str, Any]:
    """Return the settings of one of PyTorch's modules, such as the axis of a softmax."""
    held = vars(module).items()
    return {k: v for k, v in held if k[:1] != "_" and k not in _HARMLESS and type(v) in ATOMS}


def _may_change(value: Any) -> bool:
    """Whether a value of a class or a module of Python may be a setting: no property, and no library."""
    plain = type(value) in ATOMS or isinstance(value, dict | list | tuple | set | deque | enum.Enum | PLAIN)
    return (
        plain
        or isinstance(value, FunctionType | type)
        or (
            is_own(type(value).__module__)
            and not isinstance(value, ModuleType)
            and not hasattr(value, "__get__")
        )
    )
