"""What a forward pass computes once and keeps: tables by length, weights made ready, the last features."""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.models import evaluating
from secateur.common.outputs import agree, tensors_of
from secateur.common.preserving import ATOMS, PLAIN, is_own, preserved

Given = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a model: positional ones, and those by name."""

MOST = 64
"""The most tensors that are tried one by one."""
MARKS = 4
"""The most marks beside a tensor, such as the size that it was made for, that are tried one by one."""
_FAR = 3
"""How many containers and objects may lie inside each other."""


class Slot(NamedTuple):
    """Where a tensor is kept, or what says for what it was made.

    Attributes:
        path: The module.
        keys: The names and keys that lead from the module's attributes to it.
        is_entry: Whether it is an entry of a dictionary; else it is an attribute.
    """

    path: str
    keys: tuple[Any, ...]
    is_entry: bool = False


Cleared = dict[Slot, str]
"""How each slot is cleared: see `_clear`."""


@contextmanager
def without_caches(model: nn.Module, arguments: Callable[[], Given]) -> Iterator[None]:
    """Inside, a model lacks the tensors that its forward pass would make again. After it, they are back.

    They may be in attributes, in lists, dictionaries and objects, or in buffers that no file holds. So may
    what the code remembers beside them: that they were made, or for which size. A capture would take them for
    constants, a smaller copy would go on with those of the old size, and changed weights would not show.

    Args:
        model: Any model.
        arguments: Gives arguments with which it runs, positional ones and those by name. It is only called
            if the model keeps tensors.
    """
    slots = kept_tensors(model)
    cleared = made_again(model, slots, *arguments()) if slots else {}
    if not cleared:
        yield
        return
    with preserved(model):
        _clear(model, cleared)
        yield


def kept_tensors(model: nn.Module) -> dict[Slot, Any]:
    """Return the tensors, and the lists and tuples with tensors, that a model's state dict leaves out."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[Slot, Any] = {}
    seen = set[int]()  # such as a configuration that all modules share

    def look(slot: Slot, value: Any) -> None:
        if type(value) in ATOMS or id(value) in seen or len(slot.keys) > _FAR:
            return
        if _holds(value, own):
            found[slot] = value
        elif isinstance(value, dict) or _is_object(value):
            seen.add(id(value))
            is_entry = isinstance(value, dict)
            for key, held in list((value if is_entry else vars(value)).items()):
                look(Slot(slot.path, (*slot.keys, key), is_entry), held)

    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):  # its attributes are the program's constants
            continue
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and not buffer.is_meta and _may_be_set(type(module), name):
                found[Slot(path, (_BUFFERS, name))] = buffer
        for name, value in list(vars(module).items()):
            if name not in _OF_MODULES:
                look(Slot(path, (name,)), value)
    return found


def change_kept(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the tensors that `kept_tensors` finds, in place."""
    for slot, value in kept_tensors(model).items():
        if (held := _holder(model, slot)) is not None:
            held[slot.keys[-1]] = pytree.tree_map_only(Tensor, change, value)


_OF_MODULES = frozenset(vars(nn.Module()))
_BUFFERS = "_buffers"


def _holds(value: Any, own: Collection[int]) -> bool:
    """Whether a value is a tensor that no parameter or buffer is, or a list or tuple with one."""
    if isinstance(value, tuple | list):
        return len(value) < MOST and any(_holds(held, own) for held in value)
    return type(value) is Tensor and not value.is_meta and id(value) not in own


def _is_object(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, such as a dataclass, or a namespace."""
    own = isinstance(value, PLAIN) or is_own(type(value).__module__)
    return own and not isinstance(value, nn.Module | type) and hasattr(value, "__dict__")


def _holder(model: nn.Module, slot: Slot) -> dict[Any, Any] | None:
    """Return the dictionary, or the attributes, in which a slot is; None if it is not there any more."""
    held: Any = vars(model.get_submodule(slot.path))
    for key in slot.keys[:-1]:
        held = held.get(key)
        held = held if isinstance(held, dict) else getattr(held, "__dict__", None)
        if held is None:
            return None
    found: dict[Any, Any] = held
    return found


def made_again(
    model: nn.Module, slots: Mapping[Slot, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Cleared:
    """Find the tensors without which the model gives the same, and which are there again after that."""

    def run(cleared: Cleared) -> list[Tensor]:
        """The second pass on the same arguments: some code makes a table anew only for another size."""
        with evaluating(model), torch.no_grad(), seeded(0):
            model(*args, **kwargs)
            _clear(model, cleared)
            model._apply(lambda tensor: tensor.to(tensor.dtype))  # the model itself may convert them too
            found = tensors_of(model(*args, **kwargs))
            there.update(kept_tensors(model))
            there.update((flag, value_of(model, flag)) for flag in flags)
            return found

    def made(cleared: Cleared) -> Cleared | None:
        """Those that are there again; None if the model gives something else without them all."""
        there.clear()
        try:
            outputs = run(cleared)
        except Exception:  # code that needs what is missing may fail in any way
            return None
        if settings := {slot for slot in cleared if slot in flags and not is_back(slot)}:
            return made({slot: way for slot, way in cleared.items() if slot not in settings})
        return {s: way for s, way in cleared.items() if s in there} if agree(outputs, wanted) else None

    def is_back(flag: Slot) -> bool:
        return type(there[flag]) is type(flags[flag]) and bool(there[flag] == flags[flag])

    def first_made(chosen: Mapping[Slot, Any]) -> Cleared | None:
        marks = [flag for flag in flags if flag.path in {slot.path for slot in chosen}]
        ways = _WAYS if any(type(value) is list for value in chosen.values()) else _WAYS[:-1]
        beside: list[Cleared] = [{}]
        for number in _NUMBERS if marks else ():
            beside += [dict.fromkeys(marks, number), *({mark: number} for mark in marks[:MARKS])]
        for cleared, way in itertools.product(beside, ways):
            again = made(dict.fromkeys(chosen, way) | cleared)
            if again is not None and set(again) - set(flags):
                return again
        return None

    there, flags = dict[Slot, Any](), dict[Slot, Any]()
    flags.update(dict.fromkeys(_flags(model, slots)))
    try:
        wanted = run({})
    except Exception:  # the caller finds out
        return {}
    flags.update((flag, there[flag]) for flag in flags)
    if (found := first_made(slots)) is not None:
        return found
    together: Cleared = {}
    for slot in slots if 1 < len(slots) <= MOST else ():
        one = first_made({slot: slots[slot]})
        if one and made(together | one) == together | one:
            together |= one
    return together


_WAYS = ("none", "deleted", "empty")
_NUMBERS = {"zero": 0, "minus": -1}


def _clear(model: nn.Module, cleared: Mapping[Slot, str]) -> None:
    """Clear slots. Entries of dictionaries go; attributes become None, are deleted, or become an empty list.

    What the code remembers beside them becomes False, 0 or -1, or None: a value that asks for new ones.
    """
    for slot, way in cleared.items():
        held, key = _holder(model, slot), slot.keys[-1]
        if held is None or key not in held:
            continue
        value = held[key]
        if way in _NUMBERS:
            number = type(value)(_NUMBERS[way]) if isinstance(value, int | float) else None
            held[key] = False if isinstance(value, bool) else number
        elif slot.is_entry or way == "deleted":
            held.pop(key)
        else:
            held[key] = [] if way == "empty" and type(value) is list else None


def value_of(model: nn.Module, slot: Slot) -> Any:
    """What a slot holds; None if it is not there any more."""
    held = _holder(model, slot)
    return None if held is None else held.get(slot.keys[-1])


def _flags(model: nn.Module, slots: Iterable[Slot]) -> list[Slot]:
    """Return the plain attributes that methods set beside kept tensors, such as the size they are for."""
    found: dict[Slot, None] = {}
    for slot in slots:
        module, name = model.get_submodule(slot.path), next(k for k in slot.keys if k != _BUFFERS)
        for other in _set_beside(type(module), name) - _OF_MODULES:
            value = vars(module).get(other)
            plain = all(type(v) in ATOMS for v in (value if type(value) is tuple else [value]))
            if plain and value is not None:
                found[Slot(slot.path, (other,))] = None
    return list(found)


def _set_beside(kind: type, name: str) -> frozenset[str]:
    """Return the attributes that a class sets in methods that name another one, but the constructor."""
    stored = (_stored(code) for code in _methods(kind) if name in code.co_names)
    return frozenset[str]().union(*stored) - {name}


def _may_be_set(kind: type, name: str) -> bool:
    """Whether a class sets a buffer, or registers one, in a method other than the constructor."""
    return any(
        "register_buffer" in code.co_names or (name in code.co_names and name in _stored(code))
        for code in _methods(kind)
    )


def _methods(kind: type) -> Iterator[CodeType]:
    """Yield the code of the methods of a class, except the constructor's and PyTorch's."""
    for base in kind.__mro__:
        for name, method in vars(base).items() if is_own(base.__module__) else ():
            method = inspect.unwrap(method) if callable(method) else method
            if isinstance(method, FunctionType) and name != "__init__":
                yield method.__code__


def _stored(code: CodeType) -> frozenset[str]:
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")
