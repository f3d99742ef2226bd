"""Copying models."""

from __future__ import annotations

import copy
import functools
import sys
import types
import warnings
from collections import OrderedDict, deque
from typing import Any, TypeVar

import torch
from torch import nn

from secateur.common.foreign import details, error_text
from secateur.common.mapped import copied, is_mapped
from secateur.common.preserving import ATOMS
from secateur.errors import ApplyError
from secateur.targets.units.rebinding import rebind

M = TypeVar("M", bound=nn.Module)

_STANDARD = sys.stdlib_module_names
_CONTAINERS = (list, tuple, set, frozenset, deque)


def duplicate(model: M, memo: dict[int, object] | None = None) -> M:
    """Make a deep copy of a model.

    A module may keep tensors that a forward pass computed, such as its last feature map. They are copied
    without their history. Objects that Python cannot copy, such as locks and open files, are shared.
    Functions, hooks and weak references that use a part of the model use that of the copy: see `rebind`.

    Args:
        model: The model.
        memo: Objects to use in place of copies, by the ids of the originals.

    Raises:
        ApplyError: The model cannot be copied.
    """
    memo = {} if memo is None else memo
    _note(model, memo)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False):  # its tensors could not be trained
            warnings.simplefilter("ignore")  # copying makes objects of deprecated classes of PyTorch
            made = copy.deepcopy(model, memo)
            rebind(made, memo)
            return made
    except Exception as error:
        raise ApplyError(
            f"apply: expected {type(model).__name__} to be copyable, got {error_text(error)}. "
            "Remove the attribute that copy.deepcopy refuses.",
            details(error),
        ) from error


def _note(model: nn.Module, memo: dict[int, object]) -> None:
    """Add to `memo` substitutes for objects that `copy.deepcopy` refuses, or copies slowly."""
    seen: set[int] = set()
    pending: list[Any] = [model]
    while pending:
        value = pending.pop()
        if type(value) in ATOMS or id(value) in seen or id(value) in memo:
            continue
        seen.add(id(value))
        if type(value) is OrderedDict and not value:  # most hooks of modules; Python copies these slowly
            memo[id(value)] = OrderedDict()
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, torch.Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif is_mapped(value):
                copy_ = copied(value)
                wrapped = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(copy_, value.requires_grad) if wrapped else copy_
        elif isinstance(value, torch.Generator):
            memo[id(value)] = value.clone_state()
        elif isinstance(value, _CONTAINERS):
            pending += value
        elif isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            pending.append(value.__self__)
        elif isinstance(value, nn.Module | types.SimpleNamespace) or _is_plain(value):
            pending += vars(value).values()
        elif not _copies(value):
            memo[id(value)] = value


def _is_plain(value: Any) -> bool:
    """Whether a value is an ordinary object of the user's or a library's class, made of attributes."""
    library = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and not isinstance(value, type) and library not in _STANDARD


def _copies(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # each class may raise its own error
        return False
    return True


_COPY_METHODS = ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__setstate__")


class Whole:
    """A method of one module, by which a copy or pickle has all attributes of the module.

    Example:
        >>> class Forgetful(nn.Module):
        ...     __module__ = "yours"
        ...     def __getstate__(self):
        ...         return {}
        >>> module = Forgetful()
        >>> module.size = 3
        >>> keep_whole(module)
        >>> copy.deepcopy(copy.deepcopy(module)).size
        3
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, argument: Any) -> Any:
        """Return a copy of the module, or how to make one, as Python asks."""
        attributes = {k: v for k, v in vars(self.module).items() if not isinstance(v, Whole)}
        new, of = object.__new__, (type(self.module),)
        if self.name != "__deepcopy__":
            return new, of, attributes, None, None, _restore
        made = argument[id(self.module)] = new(*of)
        _restore(made, copy.deepcopy(attributes, argument))
        return made


def _restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    vars(module).update(attributes)
    keep_whole(module)


def keep_whole(module: nn.Module) -> None:
    """Let copies and pickles of a module keep all its attributes, even if its class leaves some out."""
    if any(name in vars(cls) for cls in type(module).__mro__ if _is_foreign(cls) for name in _COPY_METHODS):
        for name in ("__deepcopy__", "__reduce_ex__"):
            vars(module)[name] = Whole(module, name)


def _is_foreign(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in (*_STANDARD, "secateur", "torch")
