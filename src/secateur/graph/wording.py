"""One sentence on which sizes of the inputs may change, and which may not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.graph.inputs import FixedAxis, InputSpec, OpenAxis
    from secateur.graph.leaf import Place

MOST = 4
"""The most axes that one part of the sentence names."""

ANY = "You may change every input size that you may change in the dense model, because no shape has changed."
"""The sentence for a masked model."""

CHOICES = (
    "Choices that the code makes by sizes, arguments, flags or values of tensors were tried one by one and, "
    "up to limits, in pairs; three or more at once were not."
)
"""How far code was tried that a trace at one size, with one set of values, does not run."""

NO_OTHER = "there was no other size to try"
FIXED_BY_CAPTURE = "the dense model takes others, the captured program does not"
"""Reasons for a fixed axis that are not errors of the dense model."""

_REFUSES = "the captured program raises InputError at a size that it does not know"


def sentence(spec: InputSpec, *, program: bool = False) -> str:
    """Say which sizes may change, which must stay and why, and which were not tried.

    Args:
        spec: The inputs of the model.
        program: Whether the model is a captured program, which checks its inputs.
    """
    clauses = [_open(spec), _fixed(spec.fixed), _untried(spec), _switches(spec)]
    if program and spec.open:
        clauses.append(_REFUSES)
    text = "; ".join(filter(None, clauses))
    return f"{text[0].upper()}{text[1:]}."


def place_name(place: Place) -> str:
    """Name an axis: ``axis 1 of x``. An input without a name is called ``input 0``."""
    name, axis = place
    return f"axis {axis} of {_input(name)}"


def _open(spec: InputSpec) -> str:
    if not spec.open:
        known = bool(spec.fixed) or not spec.tensors()
        return "you may change no input size" if known else "it is not known which input sizes may change"
    how = ""
    if len(spec.open) > 1:
        every = "both" if len(spec.open) == 2 else "all"
        how = f", alone or {every} at once," if spec.together else ", but only one at a time,"
    return f"you may change {_listed(map(_one, spec.open))}{how} to sizes that the dense model takes"


def _one(axis: OpenAxis) -> str:
    """Name an axis and its sizes: ``axis 1 of ids (at least 2; 9 and 8 tried)``."""
    tried = f"{_listed(map(str, axis.tried()))} tried"
    text = f"{axis.limit}; {tried}" if axis.limit else tried
    places = _places(axis.places)
    if axis.batch:
        return f"the batch size ({places}: {text})"
    equal = ", always equal" if len(axis.places) > 1 else ""
    return f"{places}{equal} ({text})"


def _fixed(axes: Sequence[FixedAxis]) -> str:
    """Name the axes that must stay; axes with the same reason share it."""
    by_reason: dict[str, list[str]] = {}
    for axis in axes:
        by_reason.setdefault(_why(axis), []).append(f"{_places(axis.places)} at {axis.size}")
    found = [f"{_listed(iter(kept))} ({why})" for why, kept in by_reason.items()]
    return f"you must keep {_listed(iter(found))}" if found else ""


def _why(axis: FixedAxis) -> str:
    if axis.where:
        place, _, code = axis.where.partition(": ")
        return f"because of line {place}, `{code}`"
    return (
        axis.reason
        if axis.reason in (NO_OTHER, FIXED_BY_CAPTURE)
        else "the dense model failed at the others tried"
    )


def _untried(spec: InputSpec) -> str:
    """Name the axes of which no other size was tried."""
    known = {p for free in spec.open for p in free.places} | {p for one in spec.fixed for p in one.places}
    left = [
        f"{place_name((name, axis))} at {size}"
        for name, leaf in spec.tensors().items()
        for axis, size in enumerate(leaf.shape)
        if (name, axis) not in known
    ]
    return f"you must keep {_some(left)} (no other size was tried)" if left else ""


def _switches(spec: InputSpec) -> str:
    """Name the arguments of which no other value was tried, or only some values."""
    counts = spec.switches()
    names = [f"`{_input(name)}`" for name, count in counts.items() if count == 1]
    more = [f"`{_input(n)}` was tried with {c} values only" for n, c in counts.items() if c > 1]
    return "; ".join([*([f"no other value of {_some(names)} was tried"] if names else []), *more])


def _places(places: Sequence[Place]) -> str:
    """Name several axes: ``axis 1 of ids and mask``."""
    by_axis: dict[int, list[str]] = {}
    for name, axis in places:
        by_axis.setdefault(axis, []).append(_input(name))
    return _some([f"axis {axis} of {_some(names)}" for axis, names in by_axis.items()])


def _input(name: str) -> str:
    return f"input {name}" if name[:1].isdigit() else name


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST
    return _listed(iter([*names[:MOST], f"{more} more"] if more > 1 else names))


def _listed(names: Iterator[str]) -> str:
    """Join names: ``a, b and c``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
