"""Which axes of the inputs may have other sizes. Ordinary forward passes of the dense model show it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from secateur.common.foreign import error_text, source_line
from secateur.common.models import device_of
from secateur.graph.executionpath import ExecutionPath
from secateur.graph.inputs import Arguments, FixedAxis, InputSpec, OpenAxis, batch_size, resized
from secateur.graph.leaf import Place
from secateur.graph.passes import Passes
from secateur.graph.pathsearch import WORK, PathAt, Sizes, search_other_paths, search_variant
from secateur.graph.valueranges import widened
from secateur.graph.wording import NO_OTHER

SUBSETS = 20
"""The most sets of equally long axes that are tried, where not all of them can vary together."""

SMALL = 64
"""Only axes up to this size are tried at twice their size: see `_with_larger_sizes`."""

LARGE = 128
"""From this size on, an axis is first tried at a quarter of it. Smaller ones are halved."""

Attempt = Callable[[Arguments], Exception | None]
"""A function that runs the dense model and returns its error, or None."""


def open_inputs(
    model: nn.Module,
    spec: InputSpec,
    given: Arguments,
    program: ExportedProgram,
    more: Sequence[Arguments],
    passes: Passes,
) -> InputSpec:
    """Find out which inputs a model takes.

    Args:
        model: The dense model; it is left as it was.
        spec: The description of the arguments.
        given: The arguments that the model was captured with.
        program: The captured program.
        more: Further arguments of the user, which may have other sizes.
        passes: Runs ordinary forward passes of the model.

    Returns:
        The description with open and fixed axes, and with ranges of values that the model takes.
    """
    spec = with_sizes(_differing(spec, more), given, passes)
    if any(leaf.is_meta for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)):
        return spec
    path = passes.path_of(given)
    long = path is not None and path.work > WORK
    return widened(spec, given, program, passes.attempt, device_of(model), long=long)


def with_sizes(spec: InputSpec, given: Arguments, passes: Passes) -> InputSpec:
    """Add to a description its open and fixed axes, and the sizes at which the model runs other code.

    Args:
        spec: The description of the arguments. Axes that are known to vary are open already.
        given: The arguments.
        passes: Runs ordinary forward passes of the model.
    """
    spec = _with_larger_sizes(find_open_axes(spec, given, passes.attempt), given, passes)
    return _with_other_paths(spec, given, passes)


def _with_larger_sizes(spec: InputSpec, given: Arguments, passes: Passes) -> InputSpec:
    """Take larger other sizes where maps inside the model have one position only, as behind many strides.

    An operator that mixes units with positions shows it only where there are several positions.
    """
    axes = [axis for axis in spec.open if not axis.batch and axis.size <= SMALL]

    def shapes(sizes: Sequence[int]) -> list[tuple[Any, torch.Size]] | None:
        places = {p: size for axis, size in zip(axes, sizes, strict=True) for p in axis.places}
        path = passes.path_of(resized(spec, given, places))
        if path is None:
            return None
        return [(call[:3], v) for call, vs in path.calls for v in vs if isinstance(v, torch.Size)]

    if not axes or not spec.together:
        return spec
    tried = [shapes([axis.size for axis in axes]), shapes([axis.other for axis in axes])]
    if None in tried or not any(1 in shape for _, shape in tried[0] or ()):
        return spec
    tried.append(shapes([2 * axis.size for axis in axes]))
    grows = any(  # one position at the first two sizes, several at the third
        len({place for place, _ in same}) == 1 and {a, b} == {1} and c > 1
        for same in zip(*(found or () for found in tried), strict=False)
        for a, b, c in zip(*(shape for _, shape in same), strict=False)
    )
    sizes = [(2 + k) * axis.size for k, axis in enumerate(axes)]  # height and width differ
    if not grows or shapes(sizes) is None:
        return spec
    larger = {axis.places: axis.model_copy(update={"other": n}) for axis, n in zip(axes, sizes, strict=True)}
    return spec.model_copy(update={"open": tuple(larger.get(axis.places, axis) for axis in spec.open)})


def _with_other_paths(spec: InputSpec, given: Arguments, passes: Passes) -> InputSpec:
    """Add to a description what makes the forward pass take other execution paths: sizes, training mode."""
    traced = passes.path_of(given)
    if traced is None:
        return spec

    def path_at(sizes: Sizes, *, training: bool = False, answer: bool | None = None) -> ExecutionPath | None:
        return passes.path_of(resized(spec, given, spec.at(sizes)), training=training, answer=answer)

    start = _cheaper(spec, traced, path_at)
    plain = path_at(start)
    if plain is None:
        return spec
    search = search_other_paths(spec.open, plain, path_at, start, None if plain is traced else traced)
    found, learning = search.found, path_at(start, training=True)
    for answer in (True, False) if "bool" in plain.questions else ():  # each branch may ask for other sizes
        branch = path_at(start, answer=answer)
        if branch is not None and branch is not plain:
            found = found + search_variant(search, branch, partial(path_at, answer=answer), sweep=True)
    found = list(dict.fromkeys(_in_fewer_axes(spec, sizes, start, path_at) for sizes in found))
    in_training = (
        [] if learning is None else search_variant(search, learning, partial(path_at, training=True))
    )
    changed = [[k for k, axis in enumerate(spec.open) if sizes[k] != axis.size] for sizes in found]
    axes = tuple(
        axis.model_copy(
            update={"further": tuple(s[k] for s, c in zip(found, changed, strict=True) if c == [k])}
        )
        for k, axis in enumerate(spec.open)
    )
    joint = tuple(sizes for sizes, c in zip(found, changed, strict=True) if len(c) > 1)
    others = {p: axis.other for axis in spec.open for p in axis.places} if spec.together else {}
    tried = dict.fromkeys([tuple(spec.at(start).items()), tuple(others.items())])
    seen = [_trains_otherwise(passes, resized(spec, given, dict(sizes))) for sizes in tried]
    watched = [otherwise for otherwise in seen if otherwise is not None]
    training = bool(in_training) or any(watched) if watched else None
    changes = {"open": axes, "joint": joint, "training": training, "training_at": tuple(in_training)}
    return spec.model_copy(update=changes)


def _cheaper(spec: InputSpec, traced: ExecutionPath, path_at: PathAt) -> Sizes:
    """Return the sizes from which to search for other paths: the traced ones, or others that cost less.

    Where the traced pass takes long, these are the other sizes of all axes, if the code does the same there.
    """
    start, other = tuple(axis.size for axis in spec.open), tuple(axis.other for axis in spec.open)
    if traced.work <= WORK or not spec.together:
        return start
    return other if _same(path_at(other), traced) else start


def _in_fewer_axes(spec: InputSpec, sizes: Sizes, start: Sizes, path_at: PathAt) -> Sizes:
    """Return sizes with the same execution path as `sizes` that differ from the traced ones in fewer axes.

    Axes that are as in `start` get their traced size back. If the path is another one then, return `sizes`.
    A size that differs from the trace along one axis alone shows which axis makes the difference.
    """
    fewer = tuple(
        axis.size if size == first else size
        for axis, size, first in zip(spec.open, sizes, start, strict=True)
    )
    return fewer if fewer == sizes or _same(path_at(fewer), path_at(sizes)) else sizes


def _same(one: ExecutionPath | None, other: ExecutionPath | None) -> bool:
    """Whether two passes make the same calls, with the same numbers and switches."""
    parts = "distinct_calls", "numbers", "calls_with_switches"
    return (
        one is not None
        and other is not None
        and all(getattr(one, part) == getattr(other, part) for part in parts)
    )


def _trains_otherwise(passes: Passes, arguments: Arguments) -> bool | None:
    """Whether the model makes other calls in training mode; None if that cannot be watched."""
    plain, learning = passes.path_of(arguments), passes.path_of(arguments, training=True)
    return None if plain is None or learning is None else learning.calls != plain.calls


def larger_arguments(spec: InputSpec, given: Arguments, static_batch: int | None) -> Arguments | None:
    """Make arguments with other sizes along the open axes; None if the first capture takes those sizes too.

    Args:
        spec: Says which axes may vary.
        given: The arguments of the first capture.
        static_batch: The only batch size that the first capture takes; None if it takes any.
    """
    changed = [axis for axis in spec.open if static_batch is not None or not axis.batch]
    if not changed or any(v.is_meta for v in pytree.tree_leaves(given) if isinstance(v, torch.Tensor)):
        return None
    # The batch too, if it may: the model has run at these sizes.
    sizes = {p: axis.other for axis in (spec.open if spec.together else changed[:1]) for p in axis.places}
    return resized(spec, given, sizes)


def _differing(spec: InputSpec, more: Sequence[Arguments]) -> InputSpec:
    """Open those axes of a description along which the user's own inputs differ."""
    shapes = {name: leaf.shape for name, leaf in spec.tensors().items()}
    found: dict[tuple[int, int], list[Place]] = {}
    for arguments in more:
        leaves = [v for v in pytree.tree_leaves(arguments) if isinstance(v, torch.Tensor)]
        for (name, shape), leaf in zip(shapes.items(), leaves, strict=False):
            for axis, (old, new) in enumerate(zip(shape, leaf.shape, strict=False)):
                known = any((name, axis) in places for places in found.values())
                if old != new and not known:
                    found.setdefault((old, new), []).append((name, axis))
    axes = (OpenAxis(places=tuple(p), size=old, other=new) for (old, new), p in found.items())
    return spec.model_copy(update={"open": tuple(axes)})


def find_open_axes(spec: InputSpec, given: Arguments, attempt: Attempt) -> InputSpec:
    """Run the model at other sizes, to find the axes that may vary.

    Each axis is changed alone. Where that fails, all axes of the same size are changed together, or some of
    them. A large batch comes first, so that the other axes can be tried with two samples, which costs less.
    One of two samples or fewer comes last, so that it can be tried at the other sizes of the other axes.

    Args:
        spec: The description of the arguments. Axes that are known to vary are open already.
        given: The user's own arguments.
        attempt: Runs the dense model.

    Returns:
        The description, with open and fixed axes.
    """
    shapes = {name: leaf.shape for name, leaf in spec.tensors().items()}
    batch = batch_size(given)
    device = next((v.device for v in pytree.tree_leaves(given) if isinstance(v, torch.Tensor)), "cpu")
    # Drawn values are better: a model may not read a mask without padding at all, whatever its size.
    drawn: list[bool] = []  # whether the model runs on them; asked at the traced sizes only if it must be

    def tried(sizes: Mapping[Place, int]) -> Exception | None:
        if drawn[:1] != [False]:
            error = attempt(spec.example(sizes=sizes, device=device))
            if error is None:
                drawn[:] = [True]
            elif not drawn and len(shapes) == 1:  # which has to fit no other input
                if attempt(resized(spec, given, sizes)) is None:
                    drawn.append(False)
                    error = None
            elif not drawn:
                drawn.append(attempt(spec.example(device=device)) is None)
            if drawn[:1] != [False]:
                return error
        return attempt(resized(spec, given, sizes))

    found: list[OpenAxis] = list(spec.open)
    fixed: list[FixedAxis] = []
    few: dict[Place, int] = {}
    classes = _classes(shapes, batch)
    if batch <= 2 and classes and all(axis == 0 for _, axis in classes[0]):
        classes = [*classes[1:], classes[0]]
    for same in classes:
        places = _without(same, spec.open)
        if not places:
            continue
        size = shapes[places[0][0]][places[0][1]]
        is_batch = size == batch and all(axis == 0 for _, axis in places)
        options = [1, size + 1] if is_batch and size > 2 else _candidates(size)
        beside = {p: axis.other for axis in found for p in axis.places} if is_batch else {}
        axes, error = _opened(tried, spec, places, options, {**few, **beside}, batch=is_batch)
        if beside and not axes:
            axes, error = _opened(tried, spec, places, options, few, batch=is_batch)
        at = len(spec.open) if is_batch else len(found)  # the batch is the first of those that are found
        found[at:at] = axes
        if rest := _without(places, axes):
            reason, where = _said(error)
            fixed.append(FixedAxis(places=rest, size=size, reason=reason, where=where))
            continue
        if is_batch and size > 2:
            few = (
                dict.fromkeys(places, 2)
                if attempt(resized(spec, given, dict.fromkeys(places, 2))) is None
                else {}
            )
    spec = spec.model_copy(update={"open": tuple(found), "fixed": tuple(fixed)})
    every = {place: axis.other for axis in found for place in axis.places}
    if len(found) > 1 and tried(every) is not None:
        spec = spec.model_copy(update={"together": False})
    return spec


def _classes(shapes: Mapping[str, tuple[int, ...]], batch: int) -> list[tuple[Place, ...]]:
    """Group axes by size. The batch comes first: the first axes of all inputs that have its size."""
    found: dict[tuple[bool, int], list[Place]] = {}
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            if size:
                found.setdefault((axis == 0 and size == batch, size), []).append((name, axis))
    return [tuple(found[key]) for key in sorted(found, key=lambda key: not key[0])]


def _candidates(size: int) -> list[int]:
    """Return other sizes to try for an axis: smaller ones, neighbours, then some that strides divide.

    The first sizes are smaller, so that they cost less, and far from the traced size: strides round, so a
    neighbour may become the same size inside. They are even if the traced size is odd, since code may ask.
    """
    step = size & -size  # the largest power of two that divides it
    whole = [size - step] if 1 < step < size else [size + step]
    if 4 < step == size:  # a power of two
        whole = [3 * size // 2, 5 * size // 4]
    parts = [size // 2, 2 * size // 3]
    if size >= LARGE:
        parts = [size // 4, size // 3, *parts]
    smaller = (n + (n - size + 1) % 2 for n in parts)
    return list(dict.fromkeys(n for n in (*smaller, size - 1, size + 1, *whole, 2 * size) if 2 <= n != size))


def _first_accepted(
    tried: Callable[[Mapping[Place, int]], Exception | None],
    places: Iterable[Place],
    options: Iterable[int],
    few: Mapping[Place, int],
) -> tuple[int | None, Exception | None]:
    """Return the first size for all these places with which the model runs, or None and the last error."""
    error = None
    for size in options:
        error = tried({**few, **dict.fromkeys(places, size)})
        if error is None:
            return size, None
    return None, error


def _opened(
    tried: Callable[[Mapping[Place, int]], Exception | None],
    spec: InputSpec,
    places: tuple[Place, ...],
    options: Sequence[int],
    few: Mapping[Place, int],
    *,
    batch: bool,
) -> tuple[list[OpenAxis], Exception | None]:
    """Find which of several axes of one size may vary: each alone if it can, else together.

    Where not all others can vary together, some of them may. An example is a graph with as many nodes as
    features: the axes of nodes vary, the axes of features do not.

    Returns:
        The axes that may vary, and the model's error if some may not.
    """
    alone = [] if batch else _opened_alone(tried, spec, places, options[:1], few)
    rest = _without(places, alone)
    if not rest:
        return alone, None
    other, error = _first_accepted(tried, rest, options, few)
    if not batch and not alone and len(places) > 1:
        alone = _opened_alone(tried, spec, places, options if other is None else [other], few)
        rest = _without(places, alone)
    size = spec.tensors()[places[0][0]].shape[places[0][1]]
    if other is None and not batch:
        for some in _subsets(rest):
            if (other := _first_accepted(tried, some, options[:2], few)[0]) is not None:
                return [OpenAxis(places=some, size=size, other=other), *alone], error
    if other is None or not rest:
        return alone, error
    return [OpenAxis(places=rest, size=size, other=other, batch=batch), *alone], None


def _subsets(places: tuple[Place, ...]) -> list[tuple[Place, ...]]:
    """Return sets of two or more places, but not all; the largest first, and at most `SUBSETS` of them."""
    found = (itertools.combinations(places, count) for count in range(len(places) - 1, 1, -1))
    return list(itertools.islice(itertools.chain.from_iterable(found), SUBSETS))


def _without(places: tuple[Place, ...], axes: Iterable[OpenAxis]) -> tuple[Place, ...]:
    return tuple(p for p in places if all(p not in axis.places for axis in axes))


def _opened_alone(
    tried: Callable[[Mapping[Place, int]], Exception | None],
    spec: InputSpec,
    places: tuple[Place, ...],
    options: Sequence[int],
    few: Mapping[Place, int],
) -> list[OpenAxis]:
    """Return the axes that may vary alone, such as height and width. If possible, their new sizes differ.

    The axes found so far have their new sizes while the next one is tried, which mostly costs less.
    """
    found: list[OpenAxis] = []
    size = spec.tensors()[places[0][0]].shape[places[0][1]]
    for place in places:
        taken = [axis.other for axis in found]
        wanted = [n for n in (*options, *_candidates(size)) if n not in taken] + taken
        alone = None
        for sizes in ({**few, **{p: axis.other for axis in found for p in axis.places}}, few):
            if alone is None and (sizes is few or found):
                alone, _ = _first_accepted(tried, [place], wanted if found else options, sizes)
        if alone is not None:
            found.append(OpenAxis(places=(place,), size=size, other=alone))
    return found


def _said(error: Exception | None) -> tuple[str, str]:
    """Return the message of an error, and the innermost line of the user's code that was running."""
    return (NO_OTHER, "") if error is None else (error_text(error, where=False), source_line(error))
