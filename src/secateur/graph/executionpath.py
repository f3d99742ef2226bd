"""The execution path of a forward pass: its calls, and the outcomes of its comparisons of sizes.

Where a comparison has another outcome, the pass may run other lines of code. `secateur.graph.pathsearch`
searches for such sizes.
"""

from __future__ import annotations

import math
import sys
from functools import cached_property
from itertools import groupby
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.graph.flows import Flows, is_parameter
from secateur.graph.frames import LIBRARY, Line, in_pytorch, line_of_user
from secateur.graph.watchednumbers import Ratio, Size, Watched, constants, note_constants, plain, watched

_CONVERSIONS = frozenset(
    "to type type_as float half bfloat16 double int long bool cpu cuda contiguous clone".split()
)
"""Names of functions that change the dtype, the device or the layout of a tensor, and none of its axes."""

READS_VALUES = frozenset(
    "__bool__ __int__ __float__ __index__ __complex__ __contains__ item tolist numpy".split()
)
"""Names of functions that give Python the values of a tensor, on which anything may depend."""

_OF_NUMBERS = frozenset("tensor as_tensor scalar_tensor full new_tensor new_full".split())
"""Names of functions that make a tensor of numbers."""

Call = tuple[str, Line, tuple[int, ...], int]
"""A call: the name of the torch function, the line, the identities of the parameters that it was given, and
a number that tells what its tensors come from; see `Flows`.
"""

NumberedCalls = tuple[tuple[Call, tuple[int | str, ...]], ...]
"""Calls, each with numbers and strings that it was given."""

Compared = tuple[float, float, int, int]
"""A comparison: the size, or a number computed from sizes; the nearest number with another outcome; the
divisor if the size is a remainder (else 0); and the outcome. A remainder that is not compared counts as
compared: its value is the outcome.
"""


class ExecutionPath(TorchFunctionMode):
    """Records a forward pass that runs while this is active. Read the properties after the pass only.

    Attributes:
        calls: The calls of torch functions, each with the numbers and strings that it was given and the
            shapes that it returned. All calls inside PyTorch's own modules are one call without a name, since
            in training mode some of these modules make other calls for the same result. Calls that only
            convert a tensor, or that compute a number from numbers (tensors without axes), do not count: no
            axis changes there.
        calls_with_switches: The calls, with those arguments that are switches: bools and strings.
        compared: The comparisons of sizes, by their place in the code.
        work: The number of values that all calls together returned.
        questions: What the user's code asks of PyTorch's mode: ``dtype`` or ``requires_grad`` of tensors; and
            ``bool``, if it has conditions on values of tensors.
        answers: The outcomes of these conditions.
        reads_values: Whether the pass may depend on values of tensors, since Python gets some of them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare a pass of `model`."""
        super().__init__()
        self.calls: list[tuple[Call, tuple[Any, ...]]] = []
        self.calls_with_switches: set[Any] = set()
        self.work = 0
        self.compared: dict[tuple[Line, int], list[Compared]] = {}
        self._codes = set[CodeType]()
        self.questions: set[str] = set()
        self.answers: set[bool] = set()
        self.reads_values = False
        self._lengths = set[int]()
        self._flows = Flows(model)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record a call. Sizes that it returns are watched."""
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            _require_equal_lengths(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        self._codes.add(frame.f_code)
        if name in ("__get__", "size", "numel"):
            if isinstance(result, torch.Tensor):
                self._flows.through(name, args, [result], frame)
            asked = getattr(getattr(func, "__self__", None), "__name__", "")
            if asked in ("dtype", "requires_grad") and not in_pytorch(frame):
                self.questions.add(asked)
            if isinstance(result, torch.Size):
                return torch.Size([watched(v, self) for v in result])
            return watched(result, self) if type(result) is int else result
        self.reads_values |= name in READS_VALUES
        if name == "__bool__" and not in_pytorch(frame):
            self.questions.add("bool")
            self.answers.add(result)
        if frame.f_code.co_name == "handle_torch_function":  # a Python function of PyTorch
            frame = _caller(_caller(frame))
        if name == "__len__" and type(result) is int:
            self._note_length(result, frame)
            return result
        arguments = leaves((args, kwargs))
        results = [v for v in leaves(result) if isinstance(v, torch.Tensor)]
        sources = self._flows.through(name, arguments, results, frame)
        if name in _OF_NUMBERS:  # the tensor may be compared
            for value in arguments:
                if isinstance(value, Watched):
                    note_constants(frame, plain(value), self)
        shapes = [v.shape for v in results]
        with_axes = any(shapes) or any(isinstance(v, torch.Tensor) and v.ndim for v in arguments)
        if name in _CONVERSIONS or not with_axes:
            return result
        self.work += sum(map(math.prod, shapes))
        parameters = tuple(id(v) for v in arguments if is_parameter(v))
        line = line_of_user(frame)
        switches = (v for v in arguments if type(v) in (bool, str))
        self.calls_with_switches.add((name, line, parameters, *switches))
        if in_pytorch(frame):
            self._note_call_in_pytorch(line, parameters, sources)
            return result
        numbers = [v for v in arguments if type(v) in (int, Size, str)]
        self.calls.append(((name, line, parameters, sources), (*numbers, *shapes)))
        return result

    def _note_call_in_pytorch(self, line: Line, parameters: tuple[int, ...], sources: int) -> None:
        """Record a call inside a module of PyTorch. All calls from one line of the user's code are one."""
        if self.calls and self.calls[-1][0][:2] == ("", line):
            *_, before, sources = self.calls.pop()[0]  # the sources are those of its first call
            parameters = before + parameters
        self.calls.append((("", line, tuple(dict.fromkeys(parameters)), sources), ()))

    def _note_length(self, length: int, frame: FrameType) -> None:
        """Record a result of `len`. It cannot be watched, so it counts as compared with every constant."""
        self._lengths.add(length)
        note_constants(frame, length, self)

    def note(
        self, place: tuple[Line, int], size: float, flips_at: float, outcome: int, *, period: int = 0
    ) -> None:
        """Record a comparison of a size; see `Compared`."""
        self.compared.setdefault(place, []).append((size, flips_at, period, outcome))

    @cached_property
    def calls_with_constants(self) -> NumberedCalls:
        """The calls in order, with the numbers that are not sizes, and with strings such as equations."""
        return tuple((call, tuple(n for n in ns if type(n) in (int, str))) for call, ns in self.calls)

    @cached_property
    def calls_with_numbers(self) -> NumberedCalls:
        """The calls in order, with all numbers, but without the shapes of what they returned."""
        return tuple((call, tuple(plain(n) for n in ns if isinstance(n, int))) for call, ns in self.calls)

    @cached_property
    def distinct_calls(self) -> frozenset[Call]:
        """The calls without numbers and shapes, each once: a loop may run more often for larger inputs."""
        return frozenset(call for call, _ in self.calls)

    @cached_property
    def calls_without_sources(self) -> frozenset[Any]:
        """The calls without numbers, shapes and sources, each once."""
        return frozenset(call[:3] for call in self.distinct_calls)

    @cached_property
    def constants(self) -> frozenset[int]:
        """The whole numbers above 1 in the user's code that ran. It may compare sizes with them unwatched."""
        own = (code for code in self._codes if not code.co_filename.startswith(LIBRARY))
        noted = (-number for _, number in self.compared if number < -1)
        return frozenset(n for code in own for n in constants(code.co_consts)) | frozenset(noted)

    @cached_property
    def lengths(self) -> frozenset[int]:
        """The results of `len`. They are sizes, but plain numbers to Python."""
        return frozenset(self._lengths)

    @cached_property
    def numbers(self) -> frozenset[Any]:
        """The calls, each with the numbers and strings of the first time that it was made, without sizes."""
        return frozenset(dict(reversed(self.calls_with_constants)).items())

    @cached_property
    def numbers_but_lengths(self) -> frozenset[Any]:
        """`numbers` without those that equal a result of `len`, since these differ at each size."""
        lengths = self._lengths
        return frozenset((call, tuple(n for n in ns if n not in lengths)) for call, ns in self.numbers)

    @cached_property
    def outcomes(self) -> frozenset[Any]:
        """The outcomes of comparisons of sizes, by their place in the code. Repeated outcomes count once."""
        return frozenset(
            (place, tuple(outcome for outcome, _ in groupby(outcome for *_, outcome in found)))
            for place, found in self.compared.items()
        )


def _require_equal_lengths(query: Any, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> None:
    """Raise ValueError if attention has more keys than values, or fewer.

    PyTorch does not check it, and reads what lies behind the shorter tensor.
    """
    if not key.is_nested and key.shape[-2] != value.shape[-2]:
        raise ValueError(f"expected a value for each key, got {key.shape[-2]} keys, {value.shape[-2]} values")


_ATOMS = frozenset({int, Size, Ratio, bool, float, str, slice, type(...), torch.dtype, torch.device})


def leaves(value: Any) -> list[Any]:
    """Return the leaves of nested arguments. `torch.utils._pytree` does the same, and takes far longer."""
    found: list[Any] = []
    _add_leaves(value, found)
    return found


def _add_leaves(value: Any, found: list[Any]) -> None:
    kind = type(value)
    if kind is tuple or kind is list:
        for one in value:
            _add_leaves(one, found)
    elif kind is dict:
        for one in value.values():
            _add_leaves(one, found)
    elif isinstance(value, torch.Tensor) or kind in _ATOMS:
        found.append(value)
    elif value is not None:
        found += pytree.tree_leaves(value)


def _caller(frame: FrameType) -> FrameType:
    return frame if frame.f_back is None else frame.f_back
