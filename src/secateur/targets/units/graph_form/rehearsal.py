"""Rehearse a capture: run the model, and note which torch functions it calls.

A rehearsal takes a small part of the time of a capture. If two rehearsals make the same calls, on the same
tensors and with the same other arguments, captures run the same operators.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.models import copied, evaluation_mode
from secateur.common.preserving import ATOMS, preserved
from secateur.graph.executionpath import READS_VALUES
from secateur.graph.inputs import Arguments
from secateur.measure.kernels import capturable


class Rehearsal(TorchFunctionMode):
    """The calls of torch functions in one forward pass.

    Attributes:
        calls: Each call: the function, the structure of its arguments, and their leaves. A tensor is named by
            where it comes from: a parameter or buffer, an input, or the result of an earlier call. A tensor
            from anywhere else equals no other.
        reads_values: Whether a call gives Python the values of a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, list[Any]]] = []
        self.reads_values = False
        self._names: dict[int, tuple[weakref.ref[torch.Tensor], Any]] = {}
        self._kept: list[Any] = []  # keeps arguments alive, so that no two have the same id

    def name(self, tensor: torch.Tensor, name: Any) -> None:
        """Say where a tensor comes from."""
        if (found := self._names.get(id(tensor))) is None or found[0]() is not tensor:
            self._names[id(tensor)] = weakref.ref(tensor), name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and note a call."""
        kwargs = kwargs or {}
        leaves, structure = pytree.tree_flatten((args, kwargs))
        self.calls.append((func, structure, [self._named(leaf) for leaf in leaves]))
        self.reads_values |= getattr(func, "__name__", "") in READS_VALUES
        result = func(*args, **kwargs)
        for number, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, torch.Tensor):
                self.name(leaf, ("call", len(self.calls) - 1, number))
        return result

    def _named(self, leaf: Any) -> Any:
        """Return an argument in a form that can be compared with one of another rehearsal."""
        if isinstance(leaf, slice):
            return "slice", *(self._named(v) for v in (leaf.start, leaf.stop, leaf.step))
        if isinstance(leaf, torch.Tensor):
            found = self._names.get(id(leaf))
            return object() if found is None or found[0]() is not leaf else found[1]
        if type(leaf) in ATOMS:
            return type(leaf), leaf
        self._kept.append(leaf)
        return id(leaf)


def rehearsed(model: nn.Module, given: Arguments, *, training: bool = False) -> Rehearsal | None:
    """Run a model and note its calls; None if it fails, or if what it does may depend on values of tensors.

    Args:
        model: The model; it is left as it was.
        given: The arguments of the call.
        training: Whether the model runs in training mode.
    """
    rehearsal = Rehearsal()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        rehearsal.name(tensor, name)
    args, kwargs = copied(given)
    for number, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        if isinstance(leaf, torch.Tensor):
            rehearsal.name(leaf, number)
    with (
        preserved(model, parameters=training),
        evaluation_mode(model, training=training),
        capturable(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            with torch.enable_grad(), seeded(0), rehearsal:
                model(*args, **kwargs)
        except Exception:  # the user's forward may fail in any way; a capture says how
            return None
    return None if rehearsal.reads_values else rehearsal
