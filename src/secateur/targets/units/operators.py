"""The operators that a forward pass runs, without those that work on each number by itself."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.courses import leaves

_SAME = frozenset("alias clone detach _to_copy lift_fresh contiguous native_dropout".split())
"""Operators that return the numbers that they are given, or some of them."""
_NOISE = frozenset(
    "bernoulli bernoulli_ rand rand_like randn randn_like normal_ uniform_ empty empty_like new_empty".split()
)
"""Operators of dropout and noise, which draw a number for each."""


class Operators(TorchDispatchMode):
    """What runs while this is active.

    An operator that takes one tensor and works on each of its numbers by itself, as activations do, treats
    every unit alike, whatever else was removed. Such are left out, but not where they take a number that a
    size of the tensor gives: units that were removed count there.

    Attributes:
        calls: The other operators, each with its whole numbers and switches, the shapes of its results, and
            where each of its tensors comes from: a parameter, an input, or the result of an earlier call.
        inside: The modules of which the operators are looked at by themselves, and that are running.
        mixing: The modules in which another operator ran than such as work on each number.
        ran: The modules that ran.
        written: What was found to be set by the pass itself.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Any] = []
        self.inside: list[nn.Module] = []
        self.mixing: list[nn.Module] = []
        self.ran: list[nn.Module] = []
        self.written: list[Any] = []
        self._names: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        inputs = list(inputs)
        self._of_inputs = {n for leaf in inputs if isinstance(leaf, Tensor) for n in leaf.shape}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._name(tensor, name)
        for number, leaf in enumerate(inputs):
            if isinstance(leaf, Tensor):
                self._name(leaf, number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note it."""
        kwargs = kwargs or {}
        given = leaves((args, kwargs))
        names = [self._name_of(v) for v in given if isinstance(v, Tensor) and (v.numel() > 1 or v.ndim)]
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2] if hasattr(func, "_schema") else str(func)
        results = [v for v in leaves(result) if isinstance(v, Tensor)]
        whole = [one for one in names if one != "noise"]
        if name in _NOISE or (names and not whole):
            made: Any = "noise"
        elif name in _SAME or torch.Tag.pointwise in getattr(func, "tags", ()):
            made = whole[0] if len(whole) == 1 and not self._sizes_in(given) else None
        else:
            made = None
        if made is None:
            settings = [v for v in given if type(v) in (int, bool, str)] + self._sizes_in(given)
            shapes = [tuple(v.shape) for v in results]
            self.calls.append((str(func), names, settings, shapes))
            self.mixing += self.inside
        for number, tensor in enumerate(results):
            self._name(tensor, (len(self.calls), number) if made is None else made)
        return result

    def watch(self, module: nn.Module) -> None:
        """Look at the operators of a module by themselves."""

        def begin(*_: Any) -> None:
            self.ran.append(module)
            self.inside.append(module)

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(lambda *_: self.inside.remove(module))

    def works_by_number(self, module: nn.Module) -> bool:
        """Whether a module ran, and only operators in it that work on each number by itself."""
        return any(one is module for one in self.ran) and not any(one is module for one in self.mixing)

    def _sizes_in(self, given: Iterable[Any]) -> list[Any]:
        """The numbers that may follow from a size that has shrunk, as in ``h / h.shape[-1] ** 0.5``."""
        found: list[Any] = [v for v in given if type(v) in (int, float) and abs(v) not in (0, 1)]
        if not found:
            return []
        shapes = [v.shape for v in given if isinstance(v, Tensor)]
        sizes = {n for shape in shapes for n in (*shape, shape.numel())} - self._of_inputs - {0, 1}
        return [
            v for v in found if any(math.isclose(abs(v), n**k) for n in sizes for k in (1, -1, 0.5, -0.5))
        ]

    def _name(self, tensor: Tensor, name: Any) -> None:
        self._names[id(tensor)] = weakref.ref(tensor), name

    def _name_of(self, tensor: Tensor) -> Any:
        known = self._names.get(id(tensor))
        return None if known is None or known[0]() is not tensor else known[1]
