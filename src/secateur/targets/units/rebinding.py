"""Functions and weak references of a copied model that still use parts of the original."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.common.preserving import ATOMS
from secateur.graph.executionpath import leaves

_LIBRARIES = frozenset((*sys.stdlib_module_names, "torch", "secateur"))


def rebind(copy: nn.Module, memo: Mapping[int, object]) -> None:
    """Let a copied model use its own parts where `copy.deepcopy` keeps those of the original.

    These are functions that have parts of the model in their closures or default arguments, such as
    ``lambda x: self.layer(x)``, also in lists and tables, and weak references (``weakref.ref(parent)``).

    Args:
        copy: The copy. Functions and references in it are replaced.
        memo: The copies, by the ids of the originals.
    """
    _Rebinding(memo).inside(copy)


class ReadsOf(TorchFunctionMode):
    """Inside, it is noted which tensors of a model are read; `names` has their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._known, self.names = {id(tensor): name for name, tensor in tensors}, dict[str, None]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and note which tensors it was given."""
        names = (self._known.get(id(value)) for value in leaves((args, kwargs)))
        self.names |= {name: None for name in names if name is not None}
        return func(*args, **(kwargs or {}))


class _Rebinding:
    def __init__(self, memo: Mapping[int, object]) -> None:
        self._memo = memo
        self._seen: set[int] = set()  # objects of the copy
        self._made: dict[int, tuple[Any, Any]] = {}  # what the copy shares, and what takes its place

    def inside(self, value: Any) -> None:
        """Replace what an object of the copy refers to. The object itself stays."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            for key, one in list(value.items()):
                if (own := self._own(one)) is not one:
                    value[key] = own
        elif isinstance(value, list | deque):
            for number, one in enumerate(value):
                if (own := self._own(one)) is not one:
                    value[number] = own
        elif isinstance(value, set):
            found = [self._own(one) for one in value]
            if not _are_same(found, value):
                value.clear()
                value.update(found)
        elif isinstance(value, nn.Module | types.SimpleNamespace) or _is_users(value):
            self.inside(vars(value))
        elif hasattr(type(value), "replace_values"):  # a hook that remembers what the copy holds
            value.replace_values(self._own)

    def _own(self, value: Any) -> Any:
        """Return a value of the copy, or what has to take its place."""
        if type(value) in ATOMS or isinstance(value, torch.Tensor):
            return value
        own = self._shared(value)
        if own is value:
            self.inside(value)
        return own

    def _shared(self, value: Any) -> Any:
        """Return what takes the place of a value that the copy shares; the value itself if it may stay."""
        if type(value) in ATOMS:
            return value
        copied = self._memo.get(id(value), value)
        if copied is not value:
            return copied
        if id(value) not in self._made:
            self._made[id(value)] = value, value
            self._made[id(value)] = value, self._renewed(value)
        return self._made[id(value)][1]

    def _renewed(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            parts = value.__func__, value.__self__
            found = [self._shared(part) for part in parts]
            return value if _are_same(found, parts) else types.MethodType(*found)
        if type(value) is weakref.ref:
            own = self._memo.get(id(value()))
            return value if own is None else weakref.ref(own)
        if type(value) is functools.partial:
            parts = value.func, *value.args, *value.keywords.values()
            func, *rest = found = [self._shared(part) for part in parts]
            if _are_same(found, parts):
                return value
            args, kwargs = rest[: len(value.args)], rest[len(value.args) :]
            return functools.partial(func, *args, **dict(zip(value.keywords, kwargs, strict=True)))
        if type(value) in (tuple, list, set, frozenset, deque):
            found = [self._shared(one) for one in value]
            return value if _are_same(found, value) else type(value)(found)
        if type(value) is dict:
            found = [self._shared(one) for one in value.values()]
            return value if _are_same(found, value.values()) else dict(zip(value, found, strict=True))
        return value

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """Return a function that uses the copy's parts; the same one if it uses no part of the model."""
        own = [types.CellType() for _ in value.__closure__ or ()]
        made = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(own)
        )
        self._made[id(value)] = value, made  # it may call itself
        changed = False
        for cell, mine in zip(value.__closure__ or (), own, strict=True):
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                mine.cell_contents = self._shared(cell.cell_contents)
                changed |= mine.cell_contents is not cell.cell_contents and mine.cell_contents is not made
        made.__defaults__ = self._shared(value.__defaults__)
        made.__kwdefaults__ = self._shared(value.__kwdefaults__)
        vars(made).update({name: self._shared(one) for name, one in vars(value).items()})
        changed |= made.__defaults__ is not value.__defaults__
        changed |= made.__kwdefaults__ is not value.__kwdefaults__
        return made if changed or not _are_same(vars(made).values(), vars(value).values()) else value


def _are_same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(map(operator.is_, one, other))


def _is_users(value: Any) -> bool:
    """Whether a value is an ordinary object, made of attributes, of a class that is not a library's own."""
    known = type(value).__module__.partition(".")[0] in _LIBRARIES
    return hasattr(value, "__dict__") and not known and not isinstance(value, type | types.ModuleType)
