"""The code that a model's forward pass may reach, by the names that it calls, and the names in that code."""

from __future__ import annotations

import dis
import functools
import inspect
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from secateur.common.preserving import is_own
from secateur.graph.frames import codes_in

# Numbers of instructions of Python: those that set a name, and those that load one variable, or two at once.
_STORES = {dis.opmap[name] for name in ("STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR") if name in dis.opmap}
_ASKS = frozenset(("getattr", "hasattr"))
_ONE = {dis.opmap[name] for name in ("LOAD_FAST", "LOAD_FAST_BORROW") if name in dis.opmap}
_TWO = {
    dis.opmap[name]
    for name in ("LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW")
    if name in dis.opmap
}


class Reachable:
    """The names in the code that a forward pass may reach: of the user, and of libraries of models.

    Attributes:
        names: Names of attributes that the code reads, and of all that it calls.
        asked: Names that the code may ask for by `getattr` or `hasattr`, or where it catches an
            `AttributeError`.
        stored: Names of globals, and of attributes of objects other than ``self``, that the code sets.
        globals: Name of a module of Python -> the names of its globals that the code reads.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: set[str] = set()
        self.asked: set[str] = set()
        self.stored: set[str] = set()
        self.globals: dict[str, set[str]] = {}
        self._own: dict[int, set[str]] = {}  # by method: what it sets on `self`
        self._methods: dict[str, list[FunctionType]] = {}
        self._seen: set[int] = set()
        self._pending: list[FunctionType] = []
        classes: dict[type, None] = {}
        for module in model.modules():
            for value in (module, *vars(module).values()):
                self._function(value)
                if not isinstance(value, type):
                    classes.update(
                        dict.fromkeys(kind for kind in type(value).__mro__ if is_own(kind.__module__))
                    )
        for kind in classes:
            for name, value in vars(kind).items():
                functions = _functions(value)
                self._methods.setdefault(name, []).extend(functions)
                if not isinstance(value, staticmethod):
                    self._own.update((id(function), set()) for function in functions)
        for name in ("forward", "__call__", "__getattr__", "__getattribute__"):
            self._named(name)
        while self._pending:
            self._read(self._pending.pop())

    def stored_by(self, kind: type) -> set[str]:
        """The names of attributes that the methods of a class set on ``self``."""
        functions = (
            function
            for base in kind.__mro__
            for value in vars(base).values()
            for function in _functions(value)
        )
        return set[str]().union(*(self._own.get(id(function), ()) for function in functions))

    def _named(self, name: str) -> None:
        for function in self._methods.pop(name, ()):
            self._function(function)

    def _function(self, value: Any) -> None:
        for function in _functions(value):
            if id(function) not in self._seen and is_own(function.__module__):
                self._seen.add(id(function))
                self._pending.append(function)

    def _read(self, function: FunctionType) -> None:
        variables = function.__globals__
        for code in codes_in(function.__code__):
            names = set(code.co_names)
            new = names - self.names
            self.names |= names
            own = self._own.get(id(function)) if code is function.__code__ else None
            self.stored |= _stored(code, own)
            asked = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
            asked = (asked if names & _ASKS else set()) | (names if "AttributeError" in names else set())
            self.asked |= asked
            self.names |= asked
            new |= asked
            for name in new:
                self._named(name)
            for name in names & variables.keys():
                self._global(str(variables.get("__name__")), name, variables[name], names)
        for cell in function.__closure__ or ():
            try:
                self._function(cell.cell_contents)
            except ValueError:  # a variable that has no value yet
                continue

    def _global(self, module: str, name: str, value: Any, names: set[str]) -> None:
        if isinstance(value, ModuleType):
            if is_own(value.__name__):  # its values are read as attributes
                for inner in names & vars(value).keys():
                    if not isinstance(vars(value)[inner], ModuleType):
                        self._global(value.__name__, inner, vars(value)[inner], set())
            return
        self._function(value)
        if isinstance(value, FunctionType | type) and not is_own(value.__module__) and value.__name__ == name:
            return
        self.globals.setdefault(module, set()).add(name)


def _functions(value: Any) -> list[FunctionType]:
    """Return the functions in a value: of properties, decorators and partial functions too."""
    if isinstance(value, property):
        return [f for f in (value.fget, value.fset) if isinstance(f, FunctionType)][:1]
    if isinstance(value, functools.partial):
        return _functions(value.func)
    value = getattr(value, "__func__", value)  # of methods, static and class methods
    if not isinstance(value, FunctionType):
        value = getattr(value, "func", None) or getattr(value, "__wrapped__", None)
        return [value] if isinstance(value, FunctionType) else []
    inner = inspect.unwrap(value)
    return [value] if inner is value or not isinstance(inner, FunctionType) else [value, inner]


def _stored(code: CodeType, own: set[str] | None) -> set[str]:
    """Return the names of attributes and globals that code sets; those of its first argument go to `own`."""
    found, high, before = set[str](), 0, (-1, -1)
    for operation, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        number = high << 8 | low
        high = number if operation == dis.EXTENDED_ARG else 0
        if operation in _STORES:
            is_first = (before[0] in _ONE and not before[1]) or (before[0] in _TWO and not before[1] & 15)
            (own if own is not None and is_first else found).add(code.co_names[number])
        if operation != dis.EXTENDED_ARG:
            before = operation, number
    return found
