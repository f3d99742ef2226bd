"""The values that a model's code reads beside tensors: in attributes, containers and globals."""

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
"""Stands for a missing value."""
DEEP, LONG = 3, 256
"""To which depth containers in containers are watched, and the most entries of one."""
_OWN = frozenset((*vars(nn.Module()), "training", "use_cache", "_experts_implementation"))
"""Attributes that PyTorch or secateur sets."""
_CONTAINERS = nn.Sequential | nn.ModuleList | nn.ModuleDict
_ITERATING = frozenset(("children", "named_children", "_modules"))
"""Names by which code runs over the submodules of a module, also over those that are added later."""
_HARMLESS = frozenset(("p", "inplace", "training"))


@dataclass(eq=False)
class WatchedValues:
    """The values of one owner, such as an object or a dictionary, when they were noted.

    Attributes:
        title: The name of the owner, from the model on.
        kind: ``attribute``, ``slot``, ``class``, ``global``, ``dict``, ``list``, ``set``; or ``children`` of
            a module, to which others may be added, since no code names them or runs over them.
        owner: The owner; of globals the name of the module of Python.
        values: The old values by name, key or position. `NOTHING` where there was none.
        is_shared: Whether models have the owner in common, so that copies of a model have it too.
        absent: Names that an object lacks and that the code would read if the object had them.
        ignored: Keys of a dictionary or list that are not watched, as those of tensors.
    """

    title: str
    kind: str
    owner: Any
    values: dict[Any, Any]
    is_shared: bool = False
    absent: frozenset[str] = frozenset()
    ignored: frozenset[Any] = frozenset()
    _listed: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._listed = tuple(self.values.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedValues:
        """Copy the values for a copy of the model."""
        if self.is_shared:
            return self
        owner, values = copy.deepcopy(self.owner, memo), copy.deepcopy(self.values, memo)
        return WatchedValues(self.title, self.kind, owner, values, absent=self.absent, ignored=self.ignored)

    @property
    def nothing(self) -> Any:
        """What stands for a missing value. The values of a set are True, for each of its elements."""
        return False if self.kind == "set" else NOTHING

    def now(self) -> Mapping[Any, Any]:
        """Return the present values of the owner, perhaps also ones that are not watched."""
        kind, owner = self.kind, self.owner
        if kind in ("dict", "list"):
            entries = dict.items(owner) if kind == "dict" else enumerate(owner)
            return {
                k: v
                for k, v in entries
                if k not in self.ignored and (k in self.values or not isinstance(v, Tensor))
            }
        if kind == "children":
            return dict(owner)
        if kind == "set":
            return dict.fromkeys(owner, True)
        if kind == "global":
            return vars(sys.modules[owner]) if owner in sys.modules else {}
        if kind == "slot":
            return {name: getattr(owner, name) for name in self.values if hasattr(owner, name)}
        return owner.__dict__  # type: ignore[no-any-return]

    def is_same(self) -> bool:
        """Whether nothing has changed."""
        kind, owner = self.kind, self.owner
        if kind == "set":
            return bool(owner == self.values.keys())
        if kind in ("dict", "list"):
            present = self.now().values() if self.ignored else dict.values(owner) if kind == "dict" else owner
            return len(present) == len(self.values) and all(map(is_, present, self.values.values()))
        now = owner.__dict__ if kind == "attribute" else owner if kind == "children" else self.now()
        for name, value in self._listed:
            if now.get(name, NOTHING) is not value:
                return False
        return not self.absent or self.absent.isdisjoint(self._attribute_names())

    def _attribute_names(self) -> AbstractSet[str]:
        """The names of all attributes of an object, and of a module's submodules."""
        own: dict[str, Any] = self.owner.__dict__
        children: dict[str, Any] | None = own.get("_modules")
        return own.keys() | children.keys() if children else own.keys()

    def changes(self) -> list[Change]:
        """Return the values that have changed. A new object that is equal counts as the old value."""
        now, kind = self.now(), self.kind
        names = list(self.values)
        if kind in ("dict", "list", "set"):
            names += now.keys() - self.values.keys()
        if self.absent:
            names += sorted(self._attribute_names() & self.absent)
        found = []
        for name in names:
            old, new = self.values.get(name, self.nothing), now.get(name, self.nothing)
            if kind == "attribute" and new is NOTHING and isinstance(self.owner, nn.Module):
                new = _tensor_or_module(self.owner, name)
            if old is new:
                continue
            if is_alike(old, new):
                self.accept(name, new)
            elif old is not NOTHING or not _wraps(new, self.owner, name):
                found.append(Change(self, name, old, new, len(now)))
        return found

    def accept(self, name: Any, value: Any) -> None:
        """Take a value as the old one from now on."""
        self.values[name] = value
        self.absent -= {name}
        self._listed = tuple(self.values.items())

    def forget(self, name: Any) -> None:
        """Stop watching a value, since the code itself writes it."""
        if self.kind in ("dict", "list", "set") and name not in self.values:  # the container grows
            self.kind, self.values, self.owner = "global", {}, ""  # nothing of it is watched any more
        elif self.kind in ("dict", "list"):
            self.ignored |= {name}
        self.values.pop(name, None)
        self.absent -= {name}
        self._listed = tuple(self.values.items())


def _tensor_or_module(owner: nn.Module, name: str) -> Any:
    for values in (owner._modules, owner._parameters, owner._buffers):
        if name in values:
            return values[name]
    return NOTHING


def _wraps(value: Any, owner: Any, name: str) -> bool:
    """Whether a function wraps the method of the same name, as libraries do, or is one of secateur's own."""
    if not callable(value):
        return False
    inner = inspect.unwrap(value)
    elsewhere = getattr(inner, "__self__", owner) is not owner  # the method of another module
    inner = getattr(inner, "__func__", inner)
    own = (getattr(inner, "__module__", None) or "").partition(".")[0] == __name__.partition(".")[0]
    return own or (not elsewhere and inner is getattr(type(owner), name, NOTHING))


@dataclass(frozen=True, eq=False)
class Change:
    """A value that is not the old one any more."""

    entry: WatchedValues
    name: Any
    old: Any
    new: Any
    size: int = 0
    """How many values the owner had when the change was found."""

    def __str__(self) -> str:
        """Name the value, from the model on: ``model.head.options['mode']``."""
        entry = self.entry
        if entry.kind == "set":
            return f"{self.name!r} in {entry.title}"
        if entry.kind in ("dict", "list") and not entry.title.endswith("._modules"):
            return f"{entry.title}[{self.name!r}]"
        return f"{entry.title.removesuffix('._modules')}.{self.name}"

    def before(self) -> Any:
        """Return the old value; that of the class, where the object had none of its own."""
        if self.old is not NOTHING or self.entry.kind != "attribute":
            return self.old
        return getattr(type(self.entry.owner), self.name, NOTHING)

    def is_new(self) -> bool:
        """Whether the value has not been accepted: see `WatchedValues.accept`."""
        return self.entry.values.get(self.name, self.entry.nothing) is not self.new

    def is_overwritten(self) -> bool:
        """Whether the value has been replaced, or its container has grown, as a list with `append`."""
        kind = self.entry.kind
        grown = kind in ("dict", "list", "set") and len(self.entry.now()) != self.size
        return self._present() is not self.new or grown

    def is_there_again(self) -> bool:
        """Whether the new value is back, or an equal plain one, although the old one was set."""
        return is_alike(self._present(), self.new)

    def _present(self) -> Any:
        entry = self.entry
        value = entry.now().get(self.name, entry.nothing)
        if value is NOTHING and isinstance(entry.owner, nn.Module):
            value = _tensor_or_module(entry.owner, self.name)
        return value

    def put(self, value: Any) -> None:
        """Set the old or the new value."""
        owner, name, kind = self.entry.owner, self.name, self.entry.kind
        if kind == "list":
            owner.extend([NOTHING] * (name + 1 - len(owner)))
            owner[name] = value
            while owner and owner[-1] is NOTHING:
                owner.pop()
        elif kind == "set":
            (owner.add if value else owner.discard)(name)
        elif kind in ("class", "slot"):
            delattr(owner, name) if value is NOTHING else setattr(owner, name, value)
        else:
            values = (
                owner
                if kind in ("dict", "children")
                else vars(sys.modules[owner] if kind == "global" else owner)
            )
            if kind == "attribute" and isinstance(owner, nn.Module):
                for tensors in (owner._modules, owner._parameters, owner._buffers):
                    tensors.pop(name, None)
                if isinstance(value, nn.Module):
                    values = owner._modules
            if value is NOTHING:
                values.pop(name, None)
            else:
                values[name] = value


def watched_values(model: nn.Module) -> list[WatchedValues]:
    """Return the values that the code of a model reads beside tensors, for each owner.

    This is the code that the forward pass may reach, by the names that it calls. Values that this code sets
    itself are left out. Of globals, plain values, containers, functions and classes are watched.
    """
    return _Finder(model).found


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.found: list[WatchedValues] = []
        self._seen: set[int] = set()
        self._of_kind: dict[type, tuple[set[str], frozenset[str]]] = {}
        self._reach = reach = Reachable(model)
        iterates = not _ITERATING.isdisjoint(reach.names)
        for path, module in model.named_modules():
            title = ".".join(filter(None, ("model", path)))
            if module._modules:
                kind = "dict" if iterates or isinstance(module, _CONTAINERS) else "children"
                self.found.append(
                    WatchedValues(f"{title}._modules", kind, module._modules, dict(module._modules))
                )
            if any(is_own(kind.__module__) for kind in type(module).__mro__[:-2]):
                self._object(title, module, 0, shared=False)
            else:
                bare = next(module.parameters(), None) is None
                values, absent = _public(module) if bare else {}, frozenset({"forward"} - vars(module).keys())
                self._add(title, "attribute", module, values, 0, shared=False, absent=absent)
        for name, names in reach.globals.items():
            present = vars(sys.modules[name])
            values = {k: present.get(k, NOTHING) for k in names if _may_change(present.get(k))}
            self._add(f"the global {name}", "global", name, values, 0, shared=True)

    def _object(self, title: str, owner: Any, steps: int, *, shared: bool) -> None:
        """Add the attributes of an object that the code reads, and those of its class."""
        reach, own, kind = self._reach, getattr(owner, "__dict__", {}), type(owner)
        if kind not in self._of_kind:
            self._of_kind[kind] = _own_names(kind, reach)
        stored, asked = self._of_kind[kind]
        names = [k for k in own if k in reach.names and k not in stored]
        values = {k: own[k] for k in names if not isinstance(own[k], Tensor | nn.Module)}
        absent = frozenset[str]()
        if hasattr(owner, "__dict__"):
            inside = [own.get(name, {}) for name in ("_modules", "_parameters", "_buffers")]
            absent = asked.difference(own, *inside)
        self._add(title, "attribute", owner, values, steps, shared=shared, absent=absent)
        for kind in type(owner).__mro__:
            if not is_own(kind.__module__):
                continue
            of_class = {k: v for k, v in vars(kind).items() if k in reach.names and k[:2] != "__"}
            slots = [k for k, v in of_class.items() if isinstance(v, MemberDescriptorType)]
            filled = {k: getattr(owner, k) for k in slots if hasattr(owner, k) and k not in stored}
            self._add(title, "slot", owner, filled, steps, shared=shared)
            if id(kind) not in self._seen:
                self._seen.add(id(kind))
                rest = {k: v for k, v in of_class.items() if _may_change(v) and k not in own}
                self._add(f"the class {kind.__name__}", "class", kind, rest, steps, shared=True)

    def _add(
        self,
        title: str,
        kind: str,
        owner: Any,
        values: dict[Any, Any],
        steps: int,
        *,
        shared: bool,
        absent: frozenset[str] = frozenset(),
        ignored: frozenset[Any] = frozenset(),
    ) -> None:
        if values or absent or kind in ("dict", "list", "set"):
            self.found.append(WatchedValues(title, kind, owner, values, shared, absent, ignored))
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

    An attribute of the object hides a method or a value of its class with the same name, but no property.
    """
    stored = reach.stored | reach.stored_by(kind) | _OWN
    of_class = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    own = {name for base in kind.__mro__ if is_own(base.__module__) for name in vars(base)} & reach.names
    asked = {"forward"} if issubclass(kind, nn.Module) else set[str]()
    asked |= {name for name in own if _may_change(of_class[name]) or isinstance(of_class[name], staticmethod)}
    asked |= {name for name in reach.asked if name not in of_class}
    return stored, frozenset(name for name in asked - stored if name[:2] != "__")


def _public(module: nn.Module) -> dict[str, Any]:
    """Return the settings of one of PyTorch's modules, such as the axis of a softmax."""
    own = vars(module).items()
    return {k: v for k, v in own if k[:1] != "_" and k not in _HARMLESS and type(v) in ATOMS}


def _may_change(value: Any) -> bool:
    """Whether a value of a class or a module of Python may be a setting, and not a property or a library."""
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
