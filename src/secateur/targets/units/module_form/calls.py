"""Calls of torch functions with sizes, positions or counts in their arguments: reading and changing them.

A call is seen as the user's code makes it: ``x.view(2, -1, 8)``, ``torch.zeros(8, 1)``, ``x[:, :8]``. It
consists of steps. What a step has to pass in the smaller model is a `Need`: see
`secateur.targets.units.module_form.needs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.targets.units.module_form.attention import has_head_size
from secateur.targets.units.module_form.call_positions import (
    component_of,
    index_steps,
    own_axis,
    positions_of,
    positions_read,
    values_of,
    with_positions,
)
from secateur.targets.units.module_form.call_sizes import CREATORS, Arguments, is_traced, plain, sizes_in
from secateur.targets.units.module_form.needs import (
    Factor,
    Heads,
    Need,
    Number,
    Parts,
    Positions,
    Sizes,
    Step,
)

_FAMILIES = {
    "shape": (
        "view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view", "_reshape_alias",
    ),
    "expand": ("expand", "expand_as", "broadcast_to"),
    "fill": (*CREATORS, "randint", "normal", "new_zeros", "new_ones", "new_full", "new_empty"),
    "repeat": ("repeat", "tile"),
    "split": ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split"),
    "pad": ("pad", "constant_pad_nd"),
    "roll": ("roll",),
    "conv": (
        *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), "convolution",
    ),
    "group_norm": ("group_norm",),
    "layer_norm": ("layer_norm", "rms_norm"),
    "scale": (
        "mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide", "scaled_dot_product_attention",
    ),
    "attention": ("multi_head_attention_forward",),
    "range": ("arange",),
    "take": ("slice", "narrow", "select", "index", "index_select", "__getitem__", "__setitem__"),
}  # fmt: skip
FAMILIES = {name: family for family, names in _FAMILIES.items() for name in names}
"""Name of a torch function or an ATen operator -> its family."""

_PLACES = {
    "conv": ("groups", 6), "group_norm": ("num_groups", 1), "layer_norm": ("normalized_shape", 1),
    "pad": ("pad", 1), "roll": ("shifts", 1),
}  # fmt: skip
"""Family -> the argument that has its number: the keyword, and the index of the positional argument."""


def steps_of(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Step]:
    """Return the steps of a call of the torch function `name`; none if it passes no sizes."""
    family = FAMILIES.get(name)
    if family is None or (family == "scale" and factor_of(name, args, kwargs) is None):
        return []
    if family != "take":
        return [Step(family)]
    if name in ("__getitem__", "__setitem__"):
        return index_steps(args[0], args[1])
    rank = args[0].ndim
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return [Step("take", int(dim) % max(rank, 1))]


def factor_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """Return the plain number that a call multiplies or divides by; None if there is none."""
    given = _factor(name, args, kwargs)
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    return float(plain(given)) if is_number or is_traced(given) else None


def _factor(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = kwargs.get("scale", kwargs.get("other", args[1] if len(args) == 2 else None))
    if given is None and name == "scaled_dot_product_attention":
        query = args[0] if args else kwargs["query"]
        return int(query.shape[-1]) ** -0.5  # what PyTorch takes without a scale
    return given


def fits(name: str, step: Step, need: Need, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of the smaller model already passes what is needed."""
    if isinstance(need, Sizes):
        found = sizes_in(name, args, kwargs)
        if found is None:
            return True  # read from a tensor, which is smaller already
        values, offset, _ = found
        return all(
            not 0 <= axis - offset < len(values) or values[axis - offset] in (-1, new)
            for axis, _, new in need.axes
        )
    if isinstance(need, Parts):
        return _part_sizes(name, args, kwargs, need.dim) == need.sizes
    if isinstance(need, Positions):
        return bool(positions_read(name, step, args, kwargs) == positions_of(need))
    if isinstance(need, Heads):
        return has_head_size(need.size, args, kwargs)
    if isinstance(need, Factor):
        return math.isclose(factor_of(name, args, kwargs) or 0.0, need.value, rel_tol=1e-12)
    given = _number(step.family, args, kwargs)
    if not isinstance(need.value, tuple) or not isinstance(given, tuple):
        return bool(given == need.value)
    return all(new in (None, old) for new, old in zip(need.value, given, strict=True))


def stated(name: str, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> Need | None:
    """Return what a call of the dense model passes, as a need: the smaller model has to pass the same.

    None if positions are in a tensor.
    """
    if step.family == "take":
        if not isinstance(component_of(name, step, args, kwargs), int | slice):
            return None
        reads, length = (
            positions_read(name, step, args, kwargs),
            int(args[0].shape[own_axis(name, step, args)]),
        )
        if isinstance(reads, int):
            return Positions(reads, reads + 1, single=True, length=length)
        start = reads[0] if reads else 0
        even = reads == tuple(range(start, start + len(reads)))
        return Positions(start, start + len(reads), None if even else reads, length=length)
    if step.family == "split":
        given = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        dim = int(given) % max(_source(args, kwargs).ndim, 1)
        return Parts(dim, _part_sizes(name, args, kwargs, dim))
    return Number(_number(step.family, args, kwargs))


def wanted(
    name: str, step: Step, need: Need, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[tuple[Any, int]]:
    """Return the numbers in a call of the dense model that must change, each with its new value."""
    if isinstance(need, Sizes):
        found = sizes_in(name, args, kwargs)
        values, offset = found[:2] if found is not None else ([], 0)
        changes = [(axis - offset, new) for axis, old, new in need.axes if old != new]
        return [(values[k], new) for k, new in changes if 0 <= k < len(values)]
    if isinstance(need, Parts):
        given = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_sizes"))
        if isinstance(given, list | tuple) and len(given) == len(need.sizes):
            return list(zip(given, need.sizes, strict=True))
        even = name == "split" and isinstance(given, int) and len(set(need.sizes)) == 1
        return [(given, need.sizes[0])] if even else []
    if isinstance(need, Positions):
        component = component_of(name, step, args, kwargs)
        if need.single:
            return [(component, need.start)]
        if isinstance(component, slice):
            bounds = [(component.start, need.start), (component.stop, need.stop)]
            return bounds if need.listed is None else []
        return [(values_of(component), need.start)]
    if isinstance(need, Heads | Factor):
        return []
    passed: Any
    if step.family == "range":
        passed = _range(args, kwargs)
    else:
        word, place = _PLACES[step.family]
        passed = kwargs[word] if word in kwargs else args[place] if place < len(args) else None
    if isinstance(need.value, tuple):
        pairs = zip(passed if isinstance(passed, list | tuple) else (passed,), need.value, strict=True)
        return [(old, new) for old, new in pairs if new is not None]
    return [(passed, need.value)]


def observed(name: str, need: Need, args: Sequence[Any], kwargs: dict[str, Any]) -> Need:
    """Add to a need what the smaller model's code passes now, as far as it can be read.

    Of several sizes, those that are wrong are returned. They may also be sizes that should have stayed, as in
    ``x.shape[-1] // self.heads``.
    """
    if isinstance(need, Factor):
        return Factor(need.value, factor_of(name, args, kwargs) or 1.0)
    found = sizes_in(name, args, kwargs) if isinstance(need, Sizes) else None
    if not isinstance(need, Sizes) or found is None:
        return need
    values, offset, _ = found
    inside = [(axis, new) for axis, _, new in need.axes if 0 <= axis - offset < len(values)]
    passed = [(axis, int(values[axis - offset]), new) for axis, new in inside]
    return Sizes(tuple(axis for axis in passed if axis[1] not in (-1, axis[2])))


def numbers(*arguments: Any) -> list[int]:
    """Return all integers in the arguments of a call, also those in slices."""
    found: list[int] = []
    for value in arguments:
        if isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
        elif isinstance(value, slice):
            found += numbers(value.start, value.stop, value.step)
        elif isinstance(value, list | tuple):
            found += numbers(*value)
        elif isinstance(value, dict):
            found += numbers(*value.values())
    return found


def count(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return how many sizes, or other numbers, a call passes."""
    family = FAMILIES.get(name, "")
    if family == "range" or family in _PLACES:
        given = _number(family, args, kwargs)
        return len(given) if isinstance(given, tuple) else 1
    found = sizes_in(name, args, kwargs) if family in ("shape", "expand", "fill", "repeat") else None
    return 0 if found is None else len(found[0])


def changed(name: str, step: Step, need: Need, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments of a call, with one step changed to what is needed.

    Raises:
        ValueError: A size does not divide as it would have to.
    """
    if isinstance(need, Sizes):
        found = sizes_in(name, args, kwargs)
        if found is None:
            return args, kwargs
        values, offset, rebuild = found
        for axis, old, new in need.axes:
            k = axis - offset
            given = plain(values[k]) if 0 <= k < len(values) else new
            if given not in (-1, new):
                if given * new % old:
                    raise ValueError(f"expected a multiple of {old} for axis {axis}, got {given}")
                values[k] = new if given is not values[k] and given == old else values[k] * new // old
        return rebuild(values)
    if isinstance(need, Positions):
        length = args[0].shape[own_axis(name, step, args)]
        if need.length not in (None, length):
            raise ValueError(f"expected an axis of {need.length} positions, got {length}")
        return with_positions(name, step, need, args, kwargs)
    if isinstance(need, Number):
        return _with_number(step.family, need.value, args, kwargs)
    if isinstance(need, Factor):
        given = factor_of(name, args, kwargs)
        ratio = need.value / need.passed
        factor = need.value if given == need.passed else _factor(name, args, kwargs) * ratio
        attends = name == "scaled_dot_product_attention"
        word = "scale" if attends else next((word for word in ("scale", "other") if word in kwargs), None)
        return ((args[0], factor), kwargs) if word is None else (args, {**kwargs, word: factor})
    raise TypeError(f"{type(need).__name__} is no change of arguments")


def split(need: Parts, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Compute a split of any kind with the new sizes of its parts."""
    return torch.split(_source(args, kwargs), list(need.sizes), need.dim)


def _source(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = args[0] if args else kwargs["input" if "input" in kwargs else "tensor"]
    return found


def _part_sizes(name: str, args: Sequence[Any], kwargs: dict[str, Any], dim: int) -> tuple[int, ...]:
    """Return the sizes of the parts that a split gives, as its arguments say."""
    if "tensor_split" not in name:
        for given in (*args[1:2], *kwargs.values()):
            if isinstance(given, list | tuple):
                return tuple(given)  # in the smaller model they may not sum to the axis
    x = _source(args, kwargs)
    probe = torch.empty([1 if k != dim else n for k, n in enumerate(x.shape)], device="meta")
    options = dict(kwargs)
    for word in ("input", "tensor"):
        options.pop(word, None)
    call = getattr(torch.Tensor, "split" if name in ("split_with_sizes", "unsafe_split") else name)
    rest = list(args[1:])
    return tuple(part.shape[dim] for part in call(probe, *rest, **options))


_RANGE_WORDS = ("start", "end", "step")


def _range(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the numbers that a call of ``arange`` passes; None for one that is computed from data."""
    values = (*args, *(kwargs[word] for word in _RANGE_WORDS if word in kwargs))
    return tuple(None if isinstance(v, torch.Tensor) and not is_traced(v) else plain(v) for v in values)


def _number(family: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if family == "range":
        return _range(args, kwargs)
    word, place = _PLACES[family]
    value = kwargs[word] if word in kwargs else args[place] if place < len(args) else 1
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else int(value)


def _with_number(family: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    if family == "range":
        words = [word for word in _RANGE_WORDS if word in kwargs]
        given = (*args, *(kwargs[word] for word in words))
        value = [old if new is None else new for old, new in zip(given, value, strict=True)]
        return tuple(value[: len(args)]), kwargs | dict(zip(words, value[len(args) :], strict=True))
    word, place = _PLACES[family]
    if isinstance(value, tuple):
        given = kwargs[word] if word in kwargs else args[place]
        given = given if isinstance(given, list | tuple) else (given,)
        value = [old if new is None else new for old, new in zip(given, value, strict=True)]
    if word not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, word: value}
