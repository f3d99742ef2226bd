"""What a forward pass computes once and keeps: tables by length, weights made ready, the last features."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.randomness import seeded
from secateur.common.models import evaluating
from secateur.common.outputs import agree, tensors_of
from secateur.common.preserving import preserved

Given = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a model: positional ones, and those by name."""

Slot = tuple[str, str, Any]
"""Where a tensor is kept: the module's path, the attribute, and the key in a dictionary, or None."""

MOST = 64
"""The most tensors that are tried one by one."""


@contextmanager
def without_caches(model: nn.Module, arguments: Callable[[], Given]) -> Iterator[None]:
    """Inside, a model lacks the tensors that its forward pass would make again. After it, they are back.

    These are neither parameters nor buffers. A capture would take them for constants, a smaller copy would
    go on with those of the old size, and changed weights would not show.

    Args:
        model: Any model.
        arguments: Gives arguments with which it runs, positional ones and those by name. It is only called
            if the model keeps tensors.
    """
    slots = _slots(model)
    cleared = _made_again(model, slots, *arguments()) if slots else {}
    if not cleared:
        yield
        return
    with preserved(model):
        _clear(model, cleared)
        yield


def _slots(model: nn.Module) -> list[Slot]:
    """Return where modules keep tensors, or tuples of tensors, that are neither parameters nor buffers."""
    found: list[Slot] = []
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def is_kept(value: Any) -> bool:
        if isinstance(value, tuple | list):
            return bool(value) and all(map(is_kept, value))
        return type(value) is Tensor and not value.is_meta and id(value) not in own

    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _OF_MODULES:
                continue
            if is_kept(value):
                found.append((path, name, None))
            elif isinstance(value, dict):
                found += [(path, name, key) for key, held in value.items() if is_kept(held)]
    return found


_OF_MODULES = frozenset(vars(nn.Module()))


def _made_again(
    model: nn.Module, slots: Collection[Slot], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[Slot, bool]:
    """Find the tensors without which the model gives the same, and which are there again after that.

    Returns:
        For each whether its attribute is deleted; else it is set to None. Entries of dictionaries go always.
    """

    def run(cleared: Mapping[Slot, bool]) -> list[Tensor]:
        """The second pass on the same arguments: some code makes a table anew only for another size."""
        with evaluating(model), torch.no_grad(), seeded(0):
            model(*args, **kwargs)
            _clear(model, cleared)
            found = tensors_of(model(*args, **kwargs))
            there.update(_slots(model))
            return found

    def made(cleared: Mapping[Slot, bool]) -> dict[Slot, bool] | None:
        """Those that are there again; None if the model gives something else without them all."""
        there.clear()
        try:
            outputs = run(cleared)
        except Exception:  # code that needs what is missing may fail in any way
            return None
        again = {slot: way for slot, way in cleared.items() if slot in there}
        return again if agree(outputs, wanted) else None

    there = set[Slot]()
    try:
        wanted = run({})
    except Exception:  # the caller finds out
        return {}
    for delete in (False, True):
        if (found := made(dict.fromkeys(slots, delete))) is not None:
            return found
    together: dict[Slot, bool] = {}
    for slot in slots if 1 < len(slots) <= MOST else ():
        ways = (made({slot: delete}) for delete in (False, True))
        one = next((way for way in ways if way is not None), {})
        if one and made(together | one) == together | one:
            together |= one
    return together


def _clear(model: nn.Module, cleared: Mapping[Slot, bool]) -> None:
    for (path, name, key), delete in cleared.items():
        held = vars(model.get_submodule(path))
        if key is not None:
            if isinstance(held.get(name), dict):
                held[name].pop(key, None)
        elif delete:
            held.pop(name, None)
        else:
            held[name] = None
