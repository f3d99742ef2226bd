"""The axes at which units may be missing: from those of an operator's tensors to those of its results.

Axes count from the end, so the last one is -1. None stands for any axis: it is not known which.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor

from secateur.targets.units.later_calls.operator_names import TITLES

Axes = frozenset[int] | None

_PRODUCTS = frozenset("mm bmm matmul addmm baddbmm".split())
"""Products of matrices, which are the last two tensors that they take."""
_REDUCTIONS = frozenset("sum mean amax amin max min prod all any argmax argmin logsumexp".split())
"""Operators that reduce over axes, which they take as numbers."""
_VIEWS = frozenset((*TITLES, "squeeze"))
_NONE = frozenset[int]()


def axes_after(
    name: str, given: Sequence[object], axes: Sequence[Axes], shape: Sequence[int], *, by_number: bool
) -> Axes:
    """Return the axes of a result at which units may be missing.

    Args:
        name: The name of the operator.
        given: Its arguments, without lists in lists.
        axes: The axes at which units may be missing, of each tensor among `given`.
        shape: The shape of the result.
        by_number: Whether the operator works on each number by itself.
    """
    known = [one for one in axes if one is not None]
    if not known or len(known) < len(axes):
        return None
    tensors = [value for value in given if isinstance(value, Tensor)]
    if name in _PRODUCTS and len(known) > 1:
        return _of_product(*known[-2:]) if all(tensor.ndim > 1 for tensor in tensors[-2:]) else None
    if name == "linear":
        return _of_product(known[0], frozenset(-1 for axis in known[1] if axis == -2))
    if "conv" in name and len(known) > 1:
        channels = 1 - len(shape)
        return known[0] | {channels} if known[1] else known[0]
    if name == "scaled_dot_product" and len(known) > 2:
        query, key, value = known[:3]
        before = frozenset(axis for axis in query | key | value if axis < -2)
        return before | (query & {-2}) | (value & {-1})
    if name == "embedding":
        return None if any(known[1:]) else known[0] & {-1}
    same = [one for one, v in zip(known, tensors, strict=True) if by_number or v.ndim == len(shape)]
    found = _of_moves(name, given, known[0], shape)
    if found is None and (by_number or (same and name != "as_strided")):
        found = _NONE.union(*same)
    return None if found == _NONE and any(known) and not by_number else found


def _of_product(left: frozenset[int], right: frozenset[int]) -> Axes:
    return frozenset({axis for axis in left if axis < -1} | {axis for axis in right if axis != -2})


def _of_moves(name: str, given: Sequence[object], axes: frozenset[int], shape: Sequence[int]) -> Axes:
    """Return the axes after an operator that moves axes, or takes some away; None if it is another one."""
    tensor = next(value for value in given if isinstance(value, Tensor))
    numbers = [value for value in given if type(value) is int]
    before, after = tensor.ndim, len(shape)
    if name in _VIEWS:
        return axes_of_view(tensor.shape, shape, axes)
    if name == "t" or (name == "transpose" and len(numbers) == 2):
        one, other = (number % before - before for number in numbers or (-1, -2))
        swapped = {one: other, other: one}
        return frozenset(swapped.get(axis, axis) for axis in axes)
    if name == "permute" and len(numbers) == before:
        return frozenset(at - before for at, number in enumerate(numbers) if number % before - before in axes)
    if name in ("unsqueeze", "stack") and after == before + 1:
        new = (numbers or [0])[-1] % after - after
        return frozenset(axis if axis > new else axis - 1 for axis in axes)
    if name == "expand":
        return axes
    dims = numbers[:1] if name == "select" else numbers if name in _REDUCTIONS else []
    if dims and after == before - len(dims):
        dropped = {number % before - before for number in dims}
        return frozenset(axis + sum(one > axis for one in dropped) for axis in axes - dropped)
    return None


def axes_of_view(before: Sequence[int], after: Sequence[int], axes: frozenset[int]) -> Axes:
    """Return the axes of another view of the same numbers, as (2, 5, 8) is viewed as (2, 5, 2, 4).

    Neighbouring axes belong together up to where the sizes before have the same product.

    >>> sorted(axes_of_view((2, 5, 8), (2, 5, 2, 4), frozenset({-1})))
    [-2, -1]
    >>> sorted(axes_of_view((2, 5, 8), (10, 8), frozenset({-1})))
    [-1]
    """
    if 0 in before or 0 in after:
        return None
    old, new = [*accumulate(before, mul, initial=1)], [*accumulate(after, mul, initial=1)]
    common, found = {*old} & {*new}, set()
    for at in (axis + len(before) for axis in axes):
        low = max(n for n in common if n <= old[at])
        high = min((n for n in common if n >= old[at + 1]), default=old[-1])
        found |= {to - len(after) for to in range(len(after)) if low <= new[to] and new[to + 1] <= high}
    return frozenset(found)


def varies(tensor: Tensor, axes: Axes) -> bool:
    """Whether a tensor has more than one number along some axes, and so may have one for each unit."""
    at = range(-tensor.ndim, 0) if axes is None else axes
    return any(-axis <= tensor.ndim and tensor.shape[axis] != 1 for axis in at)
