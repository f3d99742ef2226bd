"""Passes of a pruned module on copies of a call: with old and with new values, and how they compare."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.outputs import tensors_of
from secateur.common.preserving import State, WritesUndone
from secateur.compat.functions import is_transformed
from secateur.targets.units.compare import relative_difference, rounding_of
from secateur.targets.units.later_calls.operators import Cut, Operators
from secateur.targets.units.later_calls.switched import named
from secateur.targets.units.later_calls.watchedvalues import Change
from secateur.targets.units.later_calls.whole_calls import ForcedOutcomes, WholeCalls

Pass = tuple[Operators, list[Tensor]]
"""What a pass ran, and its outputs."""

FEW = 8
"""The most values that are tried alone for a message."""


def run_once(
    module: nn.Module,
    given: Any,
    changes: Sequence[Change],
    values: Sequence[Any] | None,
    cut: Cut | None,
    *by_module: Any,
    forced: ForcedOutcomes | None = None,
    compared: Sequence[Any] = (),
    by_value: bool = True,
) -> tuple[Operators, list[Tensor]]:
    """Run a module once on copies of arguments. The module is as it was afterwards.

    Args:
        module: The pruned module.
        given: The arguments of the call.
        changes: What has changed.
        values: Values in place of the new ones of `changes`; None: the new values stay.
        cut: See `Operators`.
        by_module: The modules by which to compare, and the pass to compare with; see `Operators`.
        forced: Outcomes for conditions on values of tensors.
        compared: Arguments of calls that are compared, which may have other sizes.
        by_value: See `Operators`.

    Returns:
        The operators that ran, and the outputs.
    """
    args, kwargs = pytree.tree_map(_copied, given)
    with _values_set(module, changes, values):
        sizes = {n for leaf in pytree.tree_leaves(compared) if isinstance(leaf, Tensor) for n in leaf.shape}
        inputs = named(module, (args, kwargs))
        operators = Operators(
            module, inputs, cut, *by_module, shapes=not compared, sizes=sizes, by_value=by_value
        )
        for change in changes if values is None else ():
            if isinstance(change.new, nn.Module):
                operators.watch(change.new)
        with seeded(0), operators, WholeCalls(operators, forced):
            outputs = tensors_of(module.forward(*args, **kwargs))
        operators.returned(outputs)
        operators.written = [one for one in changes if values is None and one.is_overwritten()]
        return operators, [output.detach() for output in outputs]


@contextmanager
def _values_set(module: nn.Module, changes: Sequence[Change], values: Sequence[Any] | None) -> Iterator[None]:
    """Inside, a module has these values in place of the new ones; None leaves the new ones."""
    state = State(module, functions=True, parameters=module.training)
    try:
        for change, value in zip(changes, values or (), strict=False):
            change.put(value)
        with WritesUndone(module):
            yield
    finally:
        for change in changes if values is not None else ():
            change.put(change.new)
        state.restore()


def _copied(leaf: Any) -> Any:
    """Copy an argument; a tensor with its strides, since code may ask whether it is contiguous."""
    if not isinstance(leaf, Tensor):
        return copy.deepcopy(leaf)
    if is_transformed(leaf):  # `vmap` runs other operators on it, with an axis more
        return torch.ones(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    found = leaf.detach().clone()
    steps = found.layout is torch.strided and found.stride() != leaf.stride()  # or repeats in memory
    if steps:
        span = 1 + sum((n - 1) * step for n, step in zip(leaf.shape, leaf.stride(), strict=True))
        found = leaf.detach().as_strided((span,), (1,)).clone()
    if not leaf.is_leaf:  # the code may write into it, which autograd refuses for a leaf
        with torch.enable_grad():
            found = found.requires_grad_().clone()
    if steps:
        found = found.as_strided(leaf.shape, leaf.stride())
    return found.requires_grad_() if leaf.requires_grad else found


def made_by_the_code(module: nn.Module, given: Any, left: Sequence[Change]) -> list[Change]:
    """Return the changes that a pass with the old values makes itself, as code that prepares things once.

    Such a pass may fail, since it prepares a second time what is prepared already, such as hooks.
    """
    if not left:
        return []
    with _values_set(module, left, [change.old for change in left]), seeded(0):
        args, kwargs = pytree.tree_map(_copied, given)
        with suppress(Exception):
            module.forward(*args, **kwargs)
        return [change for change in left if change.is_there_again()]


def is_same(
    module: nn.Module,
    given: Any,
    left: Sequence[Change],
    values: Sequence[Any],
    new: Pass,
    cut: Cut | None,
) -> bool:
    """Whether a pass with these values instead of the new ones gives the same, or runs the same operators."""
    try:
        known = run_once(module, given, left, values, cut)
    except Exception:  # the old values may not fit these arguments
        return False
    return _are_alike(new, known)


def _are_alike(new: Pass, known: Pass) -> bool:
    """Whether a pass gives what a known one gives, or runs the same operators where units are missing."""
    (after, outputs), (before, expected) = new, known
    return relative_difference(outputs, expected) <= rounding_of(expected) or before.runs_as(after)


def is_same_by_module(module: nn.Module, given: Any, changes: Sequence[Change], cut: Cut | None) -> bool:
    """Whether passes with the old and with the new values run the same operators outside the changed modules.

    Inside these, layers with new weights may take the place of others.
    """
    owners = {str(change.entry.title).removesuffix("._modules").removeprefix("model.") for change in changes}
    paths = [path for path, _ in module.named_modules() if path in owners]
    try:
        before, _ = run_once(module, given, changes, [change.old for change in changes], cut, paths)
        after, _ = run_once(module, given, changes, None, cut, paths, before)
    except Exception:  # the old values may not fit these arguments
        return False
    return before.runs_as(after)


def decisive_first(
    module: nn.Module, given: Any, left: list[Change], new: Pass, cut: Cut | None
) -> list[Change]:
    """Put a change first that makes a difference alone, so that the message names it."""
    for change in left[:FEW] if len(left) > 1 else ():
        with suppress(Exception):
            if not run_once(module, given, [change], [change.old], cut)[0].runs_as(new[0]):
                return [change, *(one for one in left if one is not change)]
    return left
