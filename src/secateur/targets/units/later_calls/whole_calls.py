"""Functions of PyTorch that count as one operator, and the sizes that code reads; see `Operators`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from secateur.graph.executionpath import READS_VALUES, leaves
from secateur.graph.frames import Line, in_pytorch, line_of_user
from secateur.graph.watchednumbers import Watched, plain
from secateur.targets.units.later_calls.operator_names import WHOLE_CALLS
from secateur.targets.units.later_calls.operators import SAFE, Operators


@dataclass(frozen=True)
class ForcedOutcomes:
    """Outcomes of conditions on values of tensors, in order, except for conditions at the lines `usual`."""

    usual: frozenset[Line]
    outcomes: tuple[bool, ...]


class WholeCalls(TorchFunctionMode):
    """Inside, some functions count as one operator, and sizes at which units may be missing are watched.

    Attention runs without dropout, which draws for each head and position by itself.
    """

    def __init__(self, operators: Operators, forced: ForcedOutcomes | None = None) -> None:
        """Prepare a pass; `forced` has outcomes for its conditions on values of tensors."""
        super().__init__()
        self._operators, self._forced = operators, forced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__get__", "size", "numel"):
            return self._read(func, args, kwargs)
        frame = sys._getframe(1)
        if name in READS_VALUES and not in_pytorch(frame):
            return self._value(line_of_user(frame), func(*args, **kwargs))
        if name == "__set__" and isinstance(args[1], Tensor):
            self._operators.replaced(*args)
        operators, given = self._operators, leaves((args, kwargs))
        operators.line = line_of_user(frame)
        before = operators.is_sized, operators.explained
        numbers = [*_watched(given)]
        operators.is_sized |= any(number.recorder is operators for number in numbers)
        operators.explained |= {plain(number) for number in numbers if number.recorder is SAFE}
        try:
            if func is scaled_dot_product_attention:
                args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
                kwargs = {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
                return self._attention(*args, **kwargs)
            if name in WHOLE_CALLS:
                return self._operators.as_one(func, args, kwargs, given)
            return func(*args, **kwargs)
        finally:
            operators.is_sized, operators.explained = before

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        """Run attention. If queries have more heads, those of keys are noted as repeated, as with a mask."""
        query, key, value, *masks = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
        repeats = query.shape[-3] // key.shape[-3] if kwargs.get("enable_gqa") else 1
        if repeats > 1:
            pair = [v[:, :, None].expand(*v.shape[:2], repeats, *v.shape[2:]) for v in (key, value)]
            key, value = (v.reshape(len(v), -1, *v.shape[3:]) for v in pair)
        given = [query, key, value, *masks]
        return self._operators.as_one(scaled_dot_product_attention, args, kwargs, given)

    def _value(self, line: Line, value: Any) -> Any:
        """Note that Python takes a value of a tensor, and replace it by a forced outcome if there is one."""
        if type(value) is not bool:
            self._operators.reads.add(line)
            return value
        if self._forced is not None and line not in self._forced.usual:
            asked = sum(one not in self._forced.usual for one, _ in self._operators.conditions)
            value = self._forced.outcomes[asked] if asked < len(self._forced.outcomes) else value
        self._operators.conditions.append((line, value))
        return value

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function that may read sizes."""
        result = func(*args, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            return result
        if isinstance(result, torch.Size):
            return self._operators.sizes(args[0], result)
        if type(result) is not int or func.__name__ == "__get__":
            return result
        sizes = self._operators.sizes(args[0], args[0].shape)
        if func.__name__ == "size":
            return sizes[args[1] if len(args) > 1 else kwargs["dim"]]
        found: Any = 1
        for size in sizes:
            found = size * found
        return found


def _watched(given: Iterable[Any]) -> Iterator[Any]:
    for value in given:
        if isinstance(value, slice):
            yield from _watched((value.start, value.stop, value.step))
        elif isinstance(value, Watched):
            yield value


def is_right_for_other_values(
    run: Callable[[ForcedOutcomes], Operators], before: Operators, after: Operators, most: int
) -> bool:
    """Whether a call runs like a known one, whatever outcomes its conditions on values of tensors have.

    Args:
        run: Runs the call with other outcomes.
        before: The known call. Its conditions are left as they are.
        after: The call with the outcomes that it has.
        most: The most runs. If they are too few, the answer is False.
    """
    usual = frozenset(line for line, _ in before.conditions)
    left, runs = [(after, 0)], 0
    while left:
        one, done = left.pop()
        outcomes = [outcome for line, outcome in one.conditions if line not in usual]
        if not one.reads <= before.reads:
            return False
        for at in range(done, len(outcomes)):
            runs += 1
            try:
                other = run(ForcedOutcomes(usual, (*outcomes[:at], not outcomes[at])))
            except Exception:  # it may be a check of the values, or not: the next call is checked again
                return False
            if runs > most or not before.runs_as(other):
                return False
            left.append((other, at + 1))
    return True
