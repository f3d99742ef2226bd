"""Let a capture go on where sizes and branches depend on the values of integer inputs, such as lengths.

The values of the example inputs are then known, and so are those of what is computed from them alone. Python
gets real numbers of these. The program is right for these values, not for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.common.models import copied
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
    """Inside, values are known that are computed from integer and bool inputs alone.

    Attributes:
        read: The numbers of the inputs whose values became numbers of Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self._known: dict[int, tuple[Tensor, Tensor, frozenset[int]]] = {}

    def attach(self, model: nn.Module, arguments: Arguments) -> None:
        """Let a hook tell at each call of the model which of its arguments have which values."""
        self.read.clear()

        def start(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._known.clear()
            with _really():
                real = pytree.tree_leaves(copied(arguments))
            traced = pytree.tree_leaves((args, kwargs))
            for number, (leaf, value) in enumerate(zip(traced, real, strict=True)):
                if is_countable(value):
                    self._remember(leaf, value, frozenset({number}))

        model.register_forward_pre_hook(start, with_kwargs=True)

    def _remember(self, traced: Tensor, real: Tensor, inputs: frozenset[int]) -> None:
        if real.numel() <= MOST:
            self._known[id(traced)] = traced, real, inputs  # held, so that no identity is given out twice

    def real(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor that are known."""
        return self._known[id(tensor)][1]

    def numbers(self, tensor: Tensor) -> Any:
        """Return the values of a tensor as Python's own; None if they are not known."""
        found = self._known.get(id(tensor))
        if found is None:
            return None
        self.read |= found[2]
        with _really():
            return found[1].tolist()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call, and compute its values too if all that it takes is known."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _PACKING:
            made = _PACKING[name](self, *args, **kwargs)
            return func(*args, **kwargs) if made is None else made
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [v for v in leaves if isinstance(v, Tensor)]
        found = [self._known.get(id(v)) for v in tensors]
        if name in _NUMBERS and tensors and found[0] is not None:
            self.read |= found[0][2]
            with _really():
                return getattr(found[0][1], name)()
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
        held = {id(traced): real for traced, real, _ in found}
        inputs = frozenset[int]().union(*(one[2] for one in found))
        own = [held[id(v)] if isinstance(v, Tensor) and id(v) in held else v for v in leaves]
        args, kwargs = pytree.tree_unflatten(own, spec)
        with _really():
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
                    with _really():
                        self._remember(traced, real.detach(), inputs)
        return pytree.tree_unflatten(returned, kind)

    def constant(self, values: Tensor) -> Tensor:
        """Return a tensor of the capture that always has these values."""
        with _really():
            listed = values.tolist()
        made = torch.tensor(listed, dtype=values.dtype, device=values.device).reshape(values.shape)
        self._remember(made, values, frozenset())
        return made


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first tensor."""
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")


@contextmanager
def _really() -> Iterator[None]:
    """Inside, PyTorch computes real values, although a capture is under way."""
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
    with _really():
        real = torch.tensor(values)
    return mode.constant(real)


def _masked(mode: KnownValues, x: Tensor, index: Any, *value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Index with the positions that known masks choose, in place of these masks."""
    parts: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        chosen = None
        if isinstance(part, Tensor) and part.dtype is torch.bool and mode.numbers(part) is not None:
            with _really():
                chosen = mode.real(part).nonzero(as_tuple=True)
        parts += [part] if chosen is None else [mode.constant(places) for places in chosen]
    return (x, tuple(parts), *value), {}


def _repeated(
    mode: KnownValues, x: Tensor, repeats: Any = None, dim: int | None = None, **how: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Say how many entries `repeat_interleave` gives, where that is known."""
    counts = mode.numbers(x if repeats is None else repeats) if isinstance(repeats, Tensor | None) else None
    if isinstance(counts, list) and how.get("output_size") is None:
        rows = x.shape[dim] if dim is not None else x.numel()
        how["output_size"] = sum(counts) * (int(rows) if len(counts) == 1 and repeats is not None else 1)
    return ((x,) if repeats is None else (x, repeats, dim)), how


_SIZED: Mapping[str, Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "__getitem__": _masked,
    "__setitem__": _masked,
    "repeat_interleave": _repeated,
}
"""Functions whose results have sizes that depend on values, each with what gives it other arguments."""

_PACKING: Mapping[str, Callable[..., tuple[Tensor, Tensor] | None]] = {
    "_pack_padded_sequence": _pack,
    "_pad_packed_sequence": _unpack,
}
"""Functions of PyTorch whose results have sizes that depend on values, with what replaces them."""
