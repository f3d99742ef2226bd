"""The sizes that a captured program takes. They may be fewer than the dense model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import Mod, PythonMod

from secateur.errors import InputError
from secateur.graph.inputs import FixedAxis, InputSpec, OpenAxis
from secateur.graph.leaf import Place
from secateur.graph.wording import FIXED_BY_CAPTURE
from secateur.targets.units.graph_form.accepts import Accepts


def narrowed(accepts: Accepts, spec: InputSpec) -> InputSpec:
    """Describe the inputs that both the dense model and the program take.

    An axis stays open only if its size is open in the program. A size counts as tried only if the program's
    own check accepts it.

    Args:
        accepts: The inputs that the program takes.
        spec: The inputs that the dense model takes.
    """
    sizes = {(leaf.name, axis): size for leaf in accepts.leaves for axis, size in enumerate(leaf.sizes)}
    found: list[OpenAxis] = []
    fixed: list[FixedAxis] = []
    for axis in spec.open:
        symbols = {sizes[place] for place in axis.places}
        if not all(isinstance(symbol, sympy.Symbol) for symbol in symbols):
            fixed.append(FixedAxis(places=axis.places, size=axis.size, reason=FIXED_BY_CAPTURE))
            continue
        passing = [n for n in axis.tried()[1:] if _passes(accepts, spec, dict.fromkeys(axis.places, n))]
        other = axis.other if axis.other in passing else axis.size
        limit = _limit(accepts, symbols, one=axis.batch and accepts.one_sample)
        found.append(
            axis.model_copy(
                update={
                    "other": other,
                    "further": tuple(n for n in axis.further if n in passing),
                    "limit": limit,
                }
            )
        )
    every = {place: axis.other for axis in found for place in axis.places}
    together = spec.together and _passes(accepts, spec, every)
    joint = tuple(sizes for sizes in spec.joint if not fixed and _passes(accepts, spec, spec.at(sizes)))
    return spec.model_copy(
        update={
            "open": tuple(found), "fixed": (*spec.fixed, *fixed), "together": together, "joint": joint,
        }
    )  # fmt: skip


def reach(accepts: Accepts, spec: InputSpec) -> int:
    """Count the other sizes, of one axis or of all, that the program's own check accepts."""
    alone = [dict.fromkeys(axis.places, size) for axis in spec.open for size in axis.tried()[1:]]
    return sum(_passes(accepts, spec, sizes) for sizes in [*alone, *(s for _, s in spec.other_sizes())])


def _passes(accepts: Accepts, spec: InputSpec, sizes: Mapping[Place, int]) -> bool:
    """Whether the program's own check accepts inputs of these sizes."""
    return not refusal(accepts, spec, sizes)


def refusal(accepts: Accepts, spec: InputSpec, sizes: Mapping[Place, int]) -> str:
    """Say why the program's own check refuses inputs of these sizes; empty if it accepts them."""
    shapes = {
        name: [sizes.get((name, axis), n) for axis, n in enumerate(leaf.shape)]
        for name, leaf in spec.tensors().items()
    }
    tensors = [
        (leaf, torch.empty(shapes[leaf.name], device="meta"))
        for leaf in accepts.leaves
        if leaf.dtype is not None
    ]
    try:
        accepts.check_sizes(tensors)
    except InputError as error:
        return str(error)
    return ""


def _limit(accepts: Accepts, symbols: set[Any], *, one: bool) -> str:
    """Describe which values one size may have: ``at least 3``, ``a multiple of 4``; empty if it is long."""
    least = 1 if one else max(accepts.least.get(symbol, 2) for symbol in symbols)
    steps = [
        int(condition.lhs.args[1])
        for condition, _ in accepts.conditions
        if isinstance(condition, sympy.Eq)
        and condition.rhs == 0
        and isinstance(condition.lhs, Mod | PythonMod)
        and condition.lhs.args[0] in symbols
        and condition.lhs.args[1].is_Integer
    ]
    found = [f"a multiple of {step}" for step in dict.fromkeys(steps)]
    if least > max([1, *steps]):
        found.append(f"at least {least}")
    return ", ".join(found)
