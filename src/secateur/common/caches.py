"""Remove values that a forward pass has cached: tables for a length, converted weights, the last features."""

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

CallArguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a model."""

MOST = 64
"""At most this many tensors are tried one by one."""
MOST_FLAGS = 4
"""At most this many attributes beside a tensor, such as the size it was made for, are tried one by one."""
_FAR = 3
"""Largest depth of containers and objects that are searched."""


class Slot(NamedTuple):
    """The place of a cached tensor, or of an attribute that says what it was made for.

    Attributes:
        path: Path of the module.
        keys: Attribute name and keys that lead from the module to the place.
        is_entry: Whether the place is an entry of a dictionary; else it is an attribute.
    """

    path: str
    keys: tuple[Any, ...]
    is_entry: bool = False


Cleared = dict[Slot, str]
"""How each slot is cleared; see `_clear`."""


@contextmanager
def without_caches(model: nn.Module, arguments: Callable[[], CallArguments]) -> Iterator[None]:
    """Remove cached tensors inside the block: those that the next forward pass would make again.

    They may be in attributes, in lists, dictionaries and objects, or in non-persistent buffers. Attributes
    that say that they were made, or for which size, are reset, too. Otherwise a capture would take the
    tensors for constants, a smaller copy would use those of the old size, and changed weights would have no
    effect on them. After the block everything is restored.

    Args:
        model: Any model.
        arguments: Returns arguments that the model runs on. It is called only if the model keeps tensors.
    """
    slots = kept_tensors(model)
    cleared = rebuilt_tensors(model, slots, *arguments()) if slots else {}
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
    seen = set[int]()  # objects that are shared, such as a configuration

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
    """Whether a value is a tensor that is no parameter or buffer, or a list or tuple with one."""
    if isinstance(value, tuple | list):
        return len(value) < MOST and any(_holds(held, own) for held in value)
    return type(value) is Tensor and not value.is_meta and id(value) not in own


def _is_object(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, such as a dataclass, or a namespace."""
    own = isinstance(value, PLAIN) or is_own(type(value).__module__)
    return own and not isinstance(value, nn.Module | type) and hasattr(value, "__dict__")


def _holder(model: nn.Module, slot: Slot) -> dict[Any, Any] | None:
    """Return the dictionary, or the attributes, that a slot is in; None if it no longer exists."""
    held: Any = vars(model.get_submodule(slot.path))
    for key in slot.keys[:-1]:
        held = held.get(key)
        held = held if isinstance(held, dict) else getattr(held, "__dict__", None)
        if held is None:
            return None
    found: dict[Any, Any] = held
    return found


def rebuilt_tensors(
    model: nn.Module, slots: Mapping[Slot, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Cleared:
    """Find the tensors that a forward pass makes again: without them the outputs are the same.

    Returns:
        The slots of these tensors, and of the attributes beside them, with the way to clear each.
    """

    def run(cleared: Cleared) -> list[Tensor]:
        """Run once, clear the slots, and run again on the same arguments. Return the second outputs.

        The first pass is needed because some code makes a new table only if the size has changed.
        """
        with evaluating(model), torch.no_grad(), seeded(0):
            model(*args, **kwargs)
            _clear(model, cleared)
            model._apply(lambda tensor: tensor.to(tensor.dtype))  # as a conversion of the model does
            found = tensors_of(model(*args, **kwargs))
            there.update(kept_tensors(model))
            there.update((flag, value_of(model, flag)) for flag in flags)
            return found

    def made(cleared: Cleared) -> Cleared | None:
        """Return the slots that are filled again; None if the outputs differ without their values."""
        there.clear()
        try:
            outputs = run(cleared)
        except Exception:  # code may fail in any way if a value is missing
            return None
        if settings := {slot for slot in cleared if slot in flags and not is_back(slot)}:
            return made({slot: way for slot, way in cleared.items() if slot not in settings})
        return {s: way for s, way in cleared.items() if s in there} if agree(outputs, wanted) else None

    def is_back(flag: Slot) -> bool:
        return type(there[flag]) is type(flags[flag]) and bool(there[flag] == flags[flag])

    def first_made(chosen: Mapping[Slot, Any]) -> Cleared | None:
        near_flags = [flag for flag in flags if flag.path in {slot.path for slot in chosen}]
        ways = _WAYS if any(type(value) is list for value in chosen.values()) else _WAYS[:-1]
        beside: list[Cleared] = [{}]
        for number in _NUMBERS if near_flags else ():
            beside += [dict.fromkeys(near_flags, number), *({one: number} for one in near_flags[:MOST_FLAGS])]
        for cleared, way in itertools.product(beside, ways):
            again = made(dict.fromkeys(chosen, way) | cleared)
            if again is not None and set(again) - set(flags):
                return again
        return None

    there, flags = dict[Slot, Any](), dict[Slot, Any]()
    flags.update(dict.fromkeys(_flags(model, slots)))
    try:
        wanted = run({})
    except Exception:  # the model does not run: the caller will see the error
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
    """Clear slots: remove dictionary entries; set attributes to None or an empty list, or delete them.

    Attributes that say what a tensor was made for become False, 0, -1 or None, so that code makes a new one.
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
    """Return the value in a slot; None if the slot no longer exists."""
    held = _holder(model, slot)
    return None if held is None else held.get(slot.keys[-1])


def _flags(model: nn.Module, slots: Iterable[Slot]) -> list[Slot]:
    """Find plain attributes that methods set together with cached tensors, such as their size."""
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
    """Return attributes that a class sets in methods that mention `name`, except the constructor."""
    stored = (_stored(code) for code in _methods(kind) if name in code.co_names)
    return frozenset[str]().union(*stored) - {name}


def _may_be_set(kind: type, name: str) -> bool:
    """Whether a class sets or registers a buffer in another method than the constructor."""
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
