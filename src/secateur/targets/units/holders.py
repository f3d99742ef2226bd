"""What holds the values that a model's code reads beside tensors: attributes, containers, globals."""

from __future__ import annotations

import copy
import enum
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import is_
from types import FunctionType, MemberDescriptorType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from secateur.common.preserving import ATOMS, is_own
from secateur.targets.units.reachable import Reachable

NOTHING = ...
"""Stands for a value where there is none."""
DEEP, LONG = 3, 64
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
        kind: ``attribute``, ``slot``, ``class``, ``global``, ``dict``, ``list``; or ``children`` of a module,
            to which others may be added, since no code names them.
        holder: The holder; of globals the name of the module of Python.
        values: The values by name, key or position. `NOTHING` where there is none.
        is_shared: Whether models have it in common, so that copies of a model refer to the same.
    """

    title: str
    kind: str
    holder: Any
    values: dict[Any, Any]
    is_shared: bool = False
    _listed: tuple[Any, ...] = field(init=False)
    _absent: frozenset[Any] = field(init=False)

    def __post_init__(self) -> None:
        self._list()

    def _list(self) -> None:
        """Prepare `is_same`, which runs at each call: most names of some holders are absent."""
        self._listed = tuple(item for item in self.values.items() if item[1] is not NOTHING)
        self._absent = frozenset(name for name, value in self.values.items() if value is NOTHING)

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        """Copy it for a copy of the model."""
        if self.is_shared:
            return self
        return Entry(
            self.title, self.kind, copy.deepcopy(self.holder, memo), copy.deepcopy(self.values, memo)
        )

    def now(self) -> Mapping[Any, Any]:
        """Return the present values, and perhaps others."""
        if self.kind in ("dict", "children"):
            return dict(dict.items(self.holder))
        if self.kind == "list":
            return dict(enumerate(self.holder))
        if self.kind == "global":
            return vars(sys.modules[self.holder]) if self.holder in sys.modules else {}
        if self.kind == "slot":
            return {name: getattr(self.holder, name) for name in self.values if hasattr(self.holder, name)}
        return self.holder.__dict__  # type: ignore[no-any-return]

    def is_same(self) -> bool:
        """Whether nothing has changed."""
        holder = self.holder
        if self.kind == "dict":
            return len(holder) == len(self.values) and all(
                map(is_, dict.values(holder), self.values.values())
            )
        if self.kind == "list":
            return len(holder) == len(self.values) and all(map(is_, holder, self.values.values()))
        direct = self.kind in ("attribute", "children")
        now = self.now() if not direct else holder.__dict__ if self.kind == "attribute" else holder
        for name, value in self._listed:
            if now.get(name, NOTHING) is not value:
                return False
        return not self._absent or self._absent.isdisjoint(now)

    def changes(self) -> list[Change]:
        """Return what has changed. An equal value is kept as the one that there was."""
        now = self.now()
        names = [
            *self.values,
            *(() if self.kind not in ("dict", "list") else now.keys() - self.values.keys()),
        ]
        found = []
        for name in names:
            old, new = self.values.get(name, NOTHING), now.get(name, NOTHING)
            if self.kind == "attribute" and new is NOTHING and isinstance(self.holder, nn.Module):
                new = getattr(self.holder, name, NOTHING)  # a submodule, or a tensor
            if old is new:
                continue
            if type(old) is type(new) and type(old) in ATOMS and old == new:
                self.accept(name, new)
            else:
                found.append(Change(self, name, old, new))
        return found

    def accept(self, name: Any, value: Any) -> None:
        """Take a value as the one that there was."""
        self.values[name] = value
        self._list()

    def forget(self, name: Any) -> None:
        """Watch a value no longer, since the code writes it."""
        self.values.pop(name, None)
        if self.kind in ("dict", "list"):
            self.kind, self.values = "global", {}  # which is always the same
        self._list()


@dataclass(frozen=True, eq=False)
class Change:
    """A value that is another one than it was."""

    entry: Entry
    name: Any
    old: Any
    new: Any

    def __str__(self) -> str:
        """Name what holds the value, from the model on."""
        entry = self.entry
        if entry.kind in ("dict", "list") and not entry.title.endswith("._modules"):
            return f"{entry.title}[{self.name!r}]"
        return f"{entry.title.removesuffix('._modules')}.{self.name}"

    def is_new(self) -> bool:
        """Whether the value was not taken as the one that there was."""
        return self.entry.values.get(self.name, NOTHING) is not self.new

    def is_overwritten(self) -> bool:
        """Whether it is neither the old nor the new value any more."""
        held = self.entry.now().get(self.name, NOTHING)
        if held is NOTHING and isinstance(self.entry.holder, nn.Module):
            held = getattr(self.entry.holder, self.name, NOTHING)
        return held is not self.new

    def put(self, value: Any) -> None:
        """Set the old or the new value."""
        holder, name, kind = self.entry.holder, self.name, self.entry.kind
        if kind == "list":
            whole = self.entry.values if value is self.old else dict(enumerate(holder)) | {name: value}
            holder[:] = [held for held in whole.values() if held is not NOTHING]
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
        self._reach = reach = Reachable(model)
        for path, module in model.named_modules():
            title = ".".join(filter(None, ("model", path)))
            if module._modules:
                kind = "dict" if isinstance(module, _CONTAINERS) else "children"
                self.found.append(Entry(f"{title}._modules", kind, module._modules, dict(module._modules)))
            if any(is_own(kind.__module__) for kind in type(module).__mro__[:-2]):
                self._object(title, module, 0, shared=False)
            elif next(module.parameters(), None) is None:
                self._add(title, "attribute", module, _public(module), 0, shared=False)
        for name, names in reach.globals.items():
            held = vars(sys.modules[name])
            values = {k: held.get(k, NOTHING) for k in names if _may_change(held.get(k))}
            self._add(f"the global {name}", "global", name, values, 0, shared=True)

    def _object(self, title: str, holder: Any, steps: int, *, shared: bool) -> None:
        """Add the attributes of an object that the code reads, and those of its class."""
        reach, held = self._reach, getattr(holder, "__dict__", {})
        names = [k for k in held if k in reach.names and k not in reach.stored and k not in _OWN]
        values = {k: held[k] for k in names if not isinstance(held[k], Tensor | nn.Module)}
        if isinstance(holder, nn.Module):
            absent = reach.asked - held.keys() - holder._modules.keys() - holder._parameters.keys()
            values |= {k: NOTHING for k in sorted(absent - reach.stored - _OWN) if not hasattr(holder, k)}
        self._add(title, "attribute", holder, values, steps, shared=shared)
        for kind in type(holder).__mro__:
            if not is_own(kind.__module__):
                continue
            of_class = {k: v for k, v in vars(kind).items() if k in reach.names and k[:2] != "__"}
            slots = [k for k, v in of_class.items() if isinstance(v, MemberDescriptorType)]
            filled = {k: getattr(holder, k) for k in slots if hasattr(holder, k) and k not in reach.stored}
            self._add(title, "slot", holder, filled, steps, shared=shared)
            if id(kind) not in self._seen:
                self._seen.add(id(kind))
                rest = {k: v for k, v in of_class.items() if _may_change(v) and k not in held}
                self._add(f"the class {kind.__name__}", "class", kind, rest, steps, shared=True)

    def _add(
        self, title: str, kind: str, holder: Any, values: dict[Any, Any], steps: int, *, shared: bool
    ) -> None:
        if values:
            self.found.append(Entry(title, kind, holder, values, shared))
        for name, value in values.items():
            inner = f"{title}[{name!r}]" if kind in ("dict", "list") else f"{title}.{name}"
            self._value(inner, value, steps + 1, shared=shared)

    def _value(self, title: str, value: Any, steps: int, *, shared: bool) -> None:
        if type(value) in ATOMS or steps > DEEP or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict | list):
            values = dict(value) if isinstance(value, dict) else dict(enumerate(value))
            if len(values) <= LONG and not any(isinstance(v, Tensor) for v in values.values()):
                self._add(
                    title, "dict" if isinstance(value, dict) else "list", value, values, steps, shared=shared
                )
        elif isinstance(value, tuple):
            for position, one in enumerate(value[:LONG]):
                self._value(f"{title}[{position}]", one, steps, shared=shared)
        elif isinstance(value, SimpleNamespace) or (
            is_own(type(value).__module__)
            and not isinstance(value, type | nn.Module | enum.Enum | FunctionType)
        ):
            self._object(title, value, steps, shared=shared)


def _public(module: nn.Module) -> dict[str, Any]:
    """Return the settings of one of PyTorch's modules, such as the axis of a softmax."""
    held = vars(module).items()
    return {k: v for k, v in held if k[:1] != "_" and k not in _HARMLESS and type(v) in ATOMS}


def _may_change(value: Any) -> bool:
    """Whether a value of a class or a module of Python may be a setting: no property, and no library."""
    plain = type(value) in ATOMS or isinstance(value, dict | list | tuple | set | enum.Enum | SimpleNamespace)
    return (
        plain
        or isinstance(value, FunctionType | type)
        or (
            is_own(type(value).__module__)
            and not isinstance(value, ModuleType)
            and not hasattr(value, "__get__")
        )
    )
