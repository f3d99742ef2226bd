"""Restore everything that a forward pass may change in a model.

Forward passes store values in the model: caches, counters, the last features, running means in buffers. Under
`torch.export` these are tensors without data. `preserved` undoes all of this.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import types
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.common.mapped import copied

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
PLAIN = types.SimpleNamespace | argparse.Namespace | UserDict  # type: ignore[type-arg]
"""Classes of Python's library for settings, whose objects are searched."""
_FOREIGN = {
    *sys.stdlib_module_names, "accelerate", "lightning", "numpy", "pytorch_lightning", "secateur", "torch",
}  # fmt: skip
"""Libraries whose objects are not searched: they are shared with objects outside of the model."""
_FAR = 2
"""Objects are searched up to this many steps from a module: attributes are one step, closures two."""
_LONG = 10_000
"""For a longer container, the entries are remembered, but not searched."""


class State:
    """The state of a model at one moment, without the values of its parameters.

    It has every attribute and entry of the modules, of their classes, of the lists and dictionaries that they
    hold, and of objects in these. For tensors that are no parameters it also has the values. Forward passes
    in evaluation mode do not change parameters, except that of an embedding with `max_norm`.

    Example:
        >>> net = nn.Module()
        >>> net.register_buffer("calls", torch.zeros(1))
        >>> state = State(net)
        >>> net.calls += 1
        >>> net.cache = torch.ones(1)
        >>> state.restore(), net.calls, hasattr(net, "cache")
        (True, tensor([0.]), False)
        >>> state.restore()  # nothing left to restore
        False
    """

    def __init__(self, model: nn.Module, *, functions: bool = False, parameters: bool = False) -> None:
        """Remember the state of `model`.

        Args:
            model: Any module.
            functions: Also remember the closures and global containers of its functions and hooks, where
                observers store what they see.
            parameters: Also remember the values of all parameters: training passes may change some.
        """
        self._functions = functions
        self._restorers: list[Callable[[], bool]] = []
        self._empty: list[dict[Any, Any]] = []  # kept apart for speed: most dictionaries of modules are empty
        self._seen: dict[int, Any] = {}  # with the objects, so that no id is used again
        self._see(model, 0)
        for module in model.modules():
            if not parameters and isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm:
                self._values(module.weight)
        for parameter in model.parameters() if parameters else ():
            self._values(parameter)
        for buffer in model.buffers():  # a scripted module has them in no Python dictionary
            self._see(buffer, 0)

    def restore(self) -> bool:
        """Restore everything. Return whether anything had changed."""
        filled = [entries for entries in self._empty if entries] if any(self._empty) else []
        for entries in filled:
            entries.clear()
        return any([put_back() for put_back in self._restorers]) or bool(filled)

    def _see(self, value: Any, steps: int) -> None:
        if type(value) in ATOMS or steps > _FAR or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if type(value) in (dict, OrderedDict):  # first, because most values are dictionaries
            self._entries(value, steps)
        elif isinstance(value, Tensor):
            self._tensor(value, copied=steps < _FAR and not isinstance(value, nn.Parameter))
        elif isinstance(value, nn.Module):
            self._class(type(value))
            self._restorers.append(functools.partial(_same_class, value, type(value)))
            self._entries(vars(value), 0)
        elif isinstance(value, dict):
            self._entries(value, steps)
        elif isinstance(value, list | deque | set):
            self._restorers.append(functools.partial(_same_items, value, list(value)))
            self._each(value, steps)
        elif isinstance(value, tuple | frozenset):
            self._each(value, steps)
        elif isinstance(value, torch.Generator):
            self._restorers.append(functools.partial(_same_stream, value, value.get_state()))
        elif isinstance(value, functools.partial):
            self._each((value.func, value.args, value.keywords), steps)
        elif isinstance(value, types.MethodType):
            self._each((value.__self__, value.__func__), steps)
        elif isinstance(value, types.FunctionType):
            if self._functions and is_own(value.__module__):
                self._closure(value, steps + 2)
        elif isinstance(value, PLAIN) or (not isinstance(value, type) and is_own(type(value).__module__)):
            self._entries(getattr(value, "__dict__", None), steps + 1)

    def _entries(self, entries: Any, steps: int) -> None:
        if isinstance(entries, dict):
            if type(entries) in (dict, OrderedDict) and not entries:
                self._empty.append(entries)
                return
            held = dict(dict.items(entries))  # the class may have its own items()
            self._restorers.append(functools.partial(_same_entries, entries, held))
            self._each(held.values(), steps)

    def _each(self, values: Iterable[Any], steps: int) -> None:
        values = [v for v in values if type(v) not in ATOMS]
        for value in values if len(values) <= _LONG else ():
            self._see(value, steps)

    def _closure(self, function: types.FunctionType, steps: int) -> None:
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
            self._restorers.append(functools.partial(_same_cell, cell, held))
            self._see(held, steps)
        names = function.__globals__.keys() & set(function.__code__.co_names)
        self._each(_holders(function.__globals__[name] for name in names), steps)

    def _class(self, cls: type) -> None:
        """Remember the attributes of a module's classes, which a forward pass can change, too."""
        for base in cls.__mro__:
            if id(base) in self._seen:
                continue
            self._seen[id(base)] = base
            if not is_own(base.__module__):
                continue
            everything = dict(vars(base))
            held = {k: v for k, v in everything.items() if not k.startswith("__")}
            self._restorers.append(functools.partial(_same_attributes, base, held, everything))
            self._each(_holders(held.values()), 0)
            for value in held.values():
                if isinstance(value, types.FunctionType):
                    self._see(value, 0)

    def _tensor(self, tensor: Tensor, *, copied: bool) -> None:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return
        self._restorers.append(functools.partial(_same_tensor, tensor, tensor.detach(), tensor.requires_grad))
        if copied:
            self._values(tensor)

    def _values(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            self._restorers.append(functools.partial(_same_values, tensor.detach(), copied(tensor)))


@contextmanager
def preserved(model: nn.Module, *, functions: bool = False, parameters: bool = False) -> Iterator[State]:
    """After the block the model is as it was before, whatever forward passes did to it.

    Gives the state that is put back; `functions` and `parameters` as for `State`.
    """
    state = State(model, functions=functions, parameters=parameters)
    try:
        yield state
    finally:
        state.restore()


class WritesUndone(TorchFunctionMode):
    """Inside, a parameter into which code writes is copied first; at the end it gets its values back.

    Such code is an ActNorm, which takes its scale from its first batch. To copy all parameters would take the
    memory of another model.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> before = net.weight.item()
        >>> with torch.no_grad(), WritesUndone(net):
        ...     _ = net.weight.add_(1)
        >>> net.weight.item() == before
        True
    """

    def __init__(self, model: nn.Module, *, in_calls: bool = False) -> None:
        """Prepare a block in which `model` runs; `in_calls`: what others write outside of its calls stays.

        With `in_calls` the model gets hooks, which a `State` from before the block removes.
        """
        super().__init__()
        self._calls = 0 if in_calls else 1
        if in_calls:
            model.register_forward_pre_hook(lambda *_: self._count(1), prepend=True)
            model.register_forward_hook(lambda *_: self._count(-1), always_call=True)
        self._own: dict[int, list[Tensor]] = {}  # by their places in memory
        for parameter in model.parameters():
            if _has_memory(parameter):
                self._own.setdefault(_memory(parameter), []).append(parameter)
        self._before: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, after a copy of the parameters into which it may write."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "").partition(".")[0]  # ``copy_.default``
        if not self._calls:
            return func(*args, **kwargs)
        if name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")):
            self._keep(args[:1])
        if "out" in kwargs:
            self._keep(kwargs["out"])
        return func(*args, **kwargs)

    def _count(self, change: int) -> None:
        self._calls += change

    def _keep(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            if not isinstance(tensor, Tensor) or not _has_memory(tensor):
                continue
            place = _memory(tensor)
            if place in self._own and place not in self._before:
                own = self._own[place]
                self._before[place] = [(p, p.detach(), copied(p.detach())) for p in own]

    def __exit__(self, *error: Any) -> None:
        """Put the values back."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for parameter, place, values in itertools.chain(*self._before.values()):
            _same_tensor(parameter, place, parameter.requires_grad)
            _same_values(place, values)
        self._before.clear()


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # inside `torch.vmap`, say: such code cannot write into a parameter
        return -1


def _holders(values: Iterable[Any]) -> list[Any]:
    return [v for v in values if isinstance(v, Tensor | list | dict | set | deque)]


def is_own(module: str | None) -> bool:
    """Whether the user, or a library of models, wrote a module of Python, by its name."""
    return (module or "").partition(".")[0] not in _FOREIGN


def is_alike(a: Any, b: Any) -> bool:
    """Whether two values are one object, or equal plain values of one type."""
    return a is b or (type(a) is type(b) and type(a) in ATOMS and bool(a == b))


def _same_class(module: nn.Module, cls: type) -> bool:
    if type(module) is cls:
        return False
    module.__class__ = cls
    return True


def _are_same(now: Collection[Any], before: Collection[Any]) -> bool:
    if len(now) != len(before):
        return False
    return all(map(is_, now, before)) or all(map(is_alike, now, before))  # nearly always the first


def _same_entries(entries: dict[Any, Any], before: dict[Any, Any]) -> bool:
    # The methods of `dict` itself: a class of its own may make what it returns, or refuse.
    if _are_same(dict.values(entries), before.values()) and _are_same(dict.keys(entries), before.keys()):
        return False
    entries.clear()
    entries.update(before)
    return True


def _same_items(items: Any, before: list[Any]) -> bool:
    if _are_same(items, before):
        return False
    items.clear()
    (items.update if isinstance(items, set) else items.extend)(before)
    return True


def _same_attributes(cls: type, before: dict[str, Any], everything: dict[str, Any]) -> bool:
    held = vars(cls)
    if _are_same(held.values(), everything.values()) and _are_same(held.keys(), everything.keys()):
        return False  # nearly always
    now = {k: v for k, v in vars(cls).items() if not k.startswith("__")}
    new = [name for name in now if name not in before]
    other = [name for name, value in before.items() if name not in now or not is_alike(now[name], value)]
    for name in new:
        delattr(cls, name)
    for name in other:
        setattr(cls, name, before[name])
    return bool(new or other)


def _same_cell(cell: types.CellType, before: Any) -> bool:
    with suppress(ValueError):  # it has no value any more
        if is_alike(cell.cell_contents, before):
            return False
    cell.cell_contents = before
    return True


def _same_stream(generator: torch.Generator, before: Tensor) -> bool:
    if torch.equal(generator.get_state(), before):
        return False
    generator.set_state(before)
    return True


def _same_tensor(tensor: Tensor, before: Tensor, requires_grad: bool) -> bool:
    if _place(tensor) == _place(before) and tensor.requires_grad == requires_grad:
        return False
    if not requires_grad and not tensor.is_leaf:
        tensor.detach_()  # what was written into it has a history
    tensor.data = before
    tensor.requires_grad_(requires_grad)
    return True


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _same_values(tensor: Tensor, before: Tensor) -> bool:
    if torch.equal(tensor, before):
        return False
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(before)
    return True
