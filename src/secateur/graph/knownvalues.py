"""Let a capture go on where sizes and branches depend on the values of integer inputs, such as lengths.

During the capture, the values of the example inputs are known, and so are those of tensors that are computed
from them alone. Where Python asks for a number of such a tensor, it gets the real one. The program is right
for these values, not for others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.common.models import copied
from secateur.graph.answering import asking
from secateur.graph.frames import Line, in_pytorch
from secateur.graph.inputs import Arguments

_NUMBERS = frozenset("item tolist __bool__ __int__ __float__ __index__ __len__".split())
"""Names of functions that make numbers of Python from a tensor."""
_CREATORS = frozenset("zeros ones full empty arange tensor as_tensor".split())
_SHAPING = frozenset("split split_with_sizes view reshape expand repeat narrow".split())
MOST = 1 << 20
"""A larger tensor counts as unknown."""


def is_countable(value: Any) -> bool:
    """Whether a value is a tensor of integers or bools, with values."""
    return isinstance(value, Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.is_meta
    )


class KnownValues(TorchFunctionMode):
    """Inside, the values of integer and bool inputs are known, and of all that is computed from these alone.

    Attributes:
        read: The inputs whose values became numbers of Python, by their numbers among the leaves.
        inverted: Lines whose comparisons get the other outcome.
        asked: The lines of the user's code that compare such numbers, or ask whether a tensor is true.
    """

    def __init__(self, inverted: frozenset[Line] = frozenset()) -> None:
        """Give comparisons at the lines `inverted` the other outcome."""
        super().__init__()
        self.read: set[int] = set()
        self.asked: set[Line] = set()
        self.inverted = inverted
        self._known: dict[int, tuple[Tensor, Tensor, frozenset[int]]] = {}

    def attach(self, model: nn.Module, arguments: Arguments) -> None:
        """Register a hook that notes, at each call of the model, the values of its arguments."""
        self.read.clear()

        def start(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._known.clear()
            with _computing():
                real = pytree.tree_leaves(copied(arguments))
            traced = pytree.tree_leaves((args, kwargs))
            for number, (leaf, value) in enumerate(zip(traced, real, strict=True)):
                if is_countable(value):
                    self._first = leaf
                    self._remember(leaf, value, frozenset({number}))

        model.register_forward_pre_hook(start, with_kwargs=True)

    def _remember(self, traced: Tensor, real: Tensor, inputs: frozenset[int]) -> None:
        if real.numel() <= MOST:
            self._known[id(traced)] = traced, real, inputs  # `traced` is kept, so that its id stays its own

    def _by_value(self, x: Tensor, axis: int) -> Tensor:
        """Return the same tensor, read by an index that the rules cannot follow: this freezes the axis.

        What the code chooses along the axis depends on values, so the axis may hold no units.
        """
        source = self._first.reshape(-1)[:1].long() * 0
        return x.index_select(axis, torch.arange(x.shape[axis], device=source.device) + source)

    def is_value(self, part: Any) -> bool:
        """Whether a part of an index is a known value, or holds one."""
        if isinstance(part, slice):
            return any(map(self.is_value, (part.start, part.stop, part.step)))
        if isinstance(part, list | tuple):
            return any(map(self.is_value, part))
        return isinstance(part, _Number) or (
            isinstance(part, Tensor) and not part.ndim and id(part) in self._known
        )

    def outcome(self, frame: FrameType | None, outcome: bool) -> bool:
        """Note a comparison of the user's code, and return its outcome; the other one at `inverted` lines."""
        if frame is None or in_pytorch(frame):
            return outcome
        line = frame.f_code.co_filename, frame.f_lineno
        self.asked.add(line)
        return outcome is not (line in self.inverted)

    def _with_noted_numbers(self, value: Any) -> Any:
        """Replace the integers in a value, or in nested lists, by ones whose comparisons are noted."""
        if isinstance(value, list):
            return [self._with_noted_numbers(v) for v in value]
        return _Number.of(value, self) if type(value) is int else value

    def real(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor that are known."""
        return self._known[id(tensor)][1]

    def numbers(self, tensor: Tensor) -> Any:
        """Return the values of a tensor as Python's own; None if they are not known."""
        found = self._known.get(id(tensor))
        if found is None:
            return None
        self.read |= found[2]
        with _computing():
            return found[1].tolist()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call, and compute its real values too if those of all its arguments are known."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _PACKING:
            made = _PACKING[name](self, *args, **kwargs)
            return func(*args, **kwargs) if made is None else made
        for axis in _axes_by_value(self, name, args, kwargs):
            args = (self._by_value(args[0], axis), *args[1:])
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [v for v in leaves if isinstance(v, Tensor)]
        found = [self._known.get(id(v)) for v in tensors]
        if name in _NUMBERS and tensors and found[0] is not None:
            self.read |= found[0][2]
            with _computing():
                number = getattr(found[0][1], name)()
            if name == "__bool__":
                return self.outcome(asking(sys._getframe(1)), number)
            return self._with_noted_numbers(number) if name in ("item", "tolist") else number
        if (name in _CREATORS and not isinstance(next(iter(args), None), Tensor)) or name in _SHAPING:
            first = 1 if name in _SHAPING else 0  # what is cut or viewed; behind it, tensors are numbers
            leaves[first:] = [v if (n := self._number(v)) is None else n for v in leaves[first:]]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
        if name in _SIZED:
            args, kwargs = _SIZED[name](self, *args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            found = [self._known.get(id(v)) for v in leaves if isinstance(v, Tensor)]
        result = func(*args, **kwargs)
        known = all(v is not None for v in found) and not any(isinstance(v, torch.SymInt) for v in leaves)
        if known and (tensors or name in _CREATORS) and name not in ("__get__", "__set__"):
            return self._follow(func, found, leaves, spec, result)
        if tensors and _writes(name):
            self._forget(tensors[0])
        return result

    def _forget(self, written: Tensor) -> None:
        """Forget the values of a tensor into which something unknown was written, and of its views."""
        found = self._known.get(id(written))
        if found is not None:
            place = found[1].untyped_storage().data_ptr()
            same = [key for key, (_, v, _) in self._known.items() if v.untyped_storage().data_ptr() == place]
            for key in same:
                del self._known[key]

    def _number(self, value: Any) -> Any:
        """Return a known tensor without axes as a number; None for other values."""
        return self.numbers(value) if isinstance(value, Tensor) and not value.ndim else None

    def _follow(self, func: Any, found: Sequence[Any], leaves: list[Any], spec: Any, result: Any) -> Any:
        """Compute a call on the real values, and remember what it returns.

        Returns:
            The result of the capture; a constant in place of a tensor whose size depends on values.
        """
        real_values = {id(traced): real for traced, real, _ in found}
        inputs = frozenset[int]().union(*(one[2] for one in found))
        own = [real_values[id(v)] if isinstance(v, Tensor) and id(v) in real_values else v for v in leaves]
        args, kwargs = pytree.tree_unflatten(own, spec)
        with _computing():
            try:
                values = func(*args, **kwargs)
            except Exception:  # then its values stay unknown
                return result
        returned, kind = pytree.tree_flatten(result)
        for k, (traced, real) in enumerate(zip(returned, pytree.tree_leaves(values), strict=False)):
            if isinstance(traced, Tensor) and isinstance(real, Tensor):
                if any(isinstance(size, torch.SymInt) for size in traced.shape):
                    self.read |= inputs
                    returned[k] = self.constant(real)
                else:
                    with _computing():
                        self._remember(traced, real.detach(), inputs)
        return pytree.tree_unflatten(returned, kind)

    def constant(self, values: Tensor) -> Tensor:
        """Return a tensor of the capture that always has these values."""
        with _computing():
            listed = values.tolist()
        made = torch.tensor(listed, dtype=values.dtype, device=values.device).reshape(values.shape)
        self._remember(made, values, frozenset())
        return made


def _axes_by_value(mode: KnownValues, name: str, args: Any, kwargs: Any) -> list[int]:
    """Return the axes of its first tensor along which a call chooses or moves by a known value."""
    x = next(iter(args), None)
    if not isinstance(x, Tensor) or id(x) in mode._known:
        return []
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        taken = [p.ndim if isinstance(p, Tensor) and p.dtype is torch.bool else p is not None for p in index]
        inside = [k for k, part in enumerate(index) if part is Ellipsis]
        found = []
        for k, part in enumerate(index):
            if mode.is_value(part):
                behind = bool(inside) and inside[0] < k
                found.append(x.ndim - sum(taken[k:]) if behind else sum(taken[:k]))
        return found
    if name not in _DIMS or not mode.is_value([*args[1:], *kwargs.values()]):
        return []
    place = _DIMS[name]
    given = kwargs.get("dims", kwargs.get("dim", args[place] if place < len(args) else 0))
    return [int(axis) % x.ndim for axis in (given if isinstance(given, list | tuple) else (given,))]


_DIMS = {
    "split": 2,
    "split_with_sizes": 2,
    "tensor_split": 2,
    "chunk": 2,
    "narrow": 1,
    "select": 1,
    "roll": 2,
}
"""Functions that choose or move along an axis -> the position of the argument that names the axis."""


class _Number(int):
    """A value of a known tensor, or a number computed from one. Comparisons in the user's code are noted."""

    mode: KnownValues

    @classmethod
    def of(cls, value: int, mode: KnownValues) -> _Number:
        new = cls(value)
        new.mode = mode
        return new

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        return self.mode.outcome(sys._getframe(1), int(self) != 0)


def _comparison(name: str) -> Callable[[_Number, Any], Any]:
    """Make a comparison of `_Number` that is noted."""
    plain = getattr(int, name)

    def compare(self: _Number, other: Any) -> Any:
        outcome = plain(self, other)
        return self.mode.outcome(sys._getframe(1), outcome) if isinstance(outcome, bool) else outcome

    return compare


def _computed(name: str) -> Callable[[_Number, Any], Any]:
    """Make an arithmetic operator of `_Number` whose result is noted too."""
    plain = getattr(int, name)

    def compute(self: _Number, other: Any) -> Any:
        value = plain(self, other)
        return _Number.of(value, self.mode) if type(value) is int else value

    return compute


for _name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
    setattr(_Number, _name, _comparison(_name))
for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        setattr(_Number, _side, _computed(_side))


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first tensor."""
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")


@contextmanager
def _computing() -> Iterator[None]:
    """Inside, PyTorch computes real values, although a capture is running."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch._C._DisableFuncTorch():
        yield


def _pack(mode: KnownValues, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor] | None:
    """Pack sequences [time, batch, ...] by known lengths: the rows of each step that are no padding."""
    known = mode.numbers(lengths)
    if known is None:
        return None
    steps = x.transpose(0, 1) if batch_first else x
    counts = [sum(length > t for length in known) for t in range(max(known))]
    rows = [t * len(known) + k for t, count in enumerate(counts) for k in range(count)]
    data = steps.reshape(-1, *steps.shape[2:]).index_select(0, torch.tensor(rows, device=x.device))
    return data, _constant(mode, counts)


def _unpack(
    mode: KnownValues, data: Tensor, batch_sizes: Tensor, batch_first: bool, padding: float, total: int
) -> tuple[Tensor, Tensor] | None:
    """Turn packed rows back into [time, batch, ...], with padding behind each sequence."""
    counts = mode.numbers(batch_sizes)
    if counts is None:
        return None
    samples, starts = counts[0], [sum(counts[:t]) for t in range(len(counts))]
    hidden = len(data)
    rows = [starts[t] + k if k < count else hidden for t, count in enumerate(counts) for k in range(samples)]
    rows += [hidden] * (samples * max(total - len(counts), 0))
    extended = torch.cat([data, torch.full_like(data[:1], padding)])
    found = extended.index_select(0, torch.tensor(rows, device=data.device))
    found = found.reshape(-1, samples, *data.shape[1:])
    lengths = [sum(count > k for count in counts) for k in range(samples)]
    return (found.transpose(0, 1) if batch_first else found), _constant(mode, lengths)


def _constant(mode: KnownValues, values: list[int]) -> Tensor:
    with _computing():
        real = torch.tensor(values)
    return mode.constant(real)


def _index_by_masks(
    mode: KnownValues, x: Tensor, index: Any, *value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments for indexing with the positions that known masks choose, in place of these masks."""
    parts: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        chosen = None
        if isinstance(part, Tensor) and part.dtype is torch.bool and mode.numbers(part) is not None:
            with _computing():
                chosen = mode.real(part).nonzero(as_tuple=True)
        parts += [part] if chosen is None else [mode.constant(places) for places in chosen]
    return (x, tuple(parts), *value), {}


def _with_output_size(
    mode: KnownValues, x: Tensor, repeats: Any = None, dim: int | None = None, **how: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments for `repeat_interleave` that say how many entries it gives, where that is known."""
    counts = mode.numbers(x if repeats is None else repeats) if isinstance(repeats, Tensor | None) else None
    if isinstance(counts, list) and how.get("output_size") is None:
        rows = x.shape[dim] if dim is not None else x.numel()
        how["output_size"] = sum(counts) * (int(rows) if len(counts) == 1 and repeats is not None else 1)
    return ((x,) if repeats is None else (x, repeats, dim)), how


_SIZED: Mapping[str, Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "__getitem__": _index_by_masks,
    "__setitem__": _index_by_masks,
    "repeat_interleave": _with_output_size,
}
"""Functions whose results have sizes that depend on values -> what returns arguments that fix the sizes."""

_PACKING: Mapping[str, Callable[..., tuple[Tensor, Tensor] | None]] = {
    "_pack_padded_sequence": _pack,
    "_pad_packed_sequence": _unpack,
}
"""Functions of PyTorch whose results have sizes that depend on values -> what replaces them."""
