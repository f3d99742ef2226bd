"""`sc.trace`: a model is captured, its tensors are labelled, and the labels become groups."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.calibration.reading import Forward, Reading
from secateur.common.caches import without_caches
from secateur.common.collecting import old_uncollected
from secateur.common.models import named_tensors, unwrap
from secateur.common.modes import require_plain_modes
from secateur.errors import CaptureError, SettingError
from secateur.graph.assemble import assemble, cost_model
from secateur.graph.branches import capture_branches
from secateur.graph.capture import Capture, require_parameters
from secateur.graph.datasizes import measure_sizes
from secateur.graph.flags import attributes_of
from secateur.graph.folding import foldable, folded
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.inputs import Arguments, InputSpec, batch_size, call_arguments
from secateur.graph.kept import Labelled
from secateur.graph.nothing import nothing_to_prune, require_no_masks, require_plain_code
from secateur.graph.openaxes import larger_arguments, open_inputs, with_sizes
from secateur.graph.passes import FirstPass, Passes, calls_of
from secateur.graph.programs import Programs, values_at
from secateur.graph.views import View, calls_in_a_row, further_views
from secateur.graph.walk import keep_inputs_of, walk
from secateur.targets.granularity import by_granularity
from secateur.targets.units.spread import gathered

PAIRS = 10
"""The most pairs of kinds of inputs that are tried together."""

if TYPE_CHECKING:
    from secateur.targets.blocks.graph import BlockGraph
    from secateur.targets.experts.graph import ExpertGraph
    from secateur.targets.weights.weights import Weights


@overload
def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    granularity: Literal["expert"],
    forward: Forward | None = None,
) -> ExpertGraph: ...


@overload
def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    granularity: Literal["block"],
    forward: Forward | None = None,
) -> BlockGraph: ...


@overload
def trace(model: nn.Module, *, granularity: Literal["weight"]) -> Weights: ...


@overload
def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    granularity: Literal["unit", "head_size", "rank"] = "unit",
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    allow_inexact: bool = False,
    forward: Forward | None = None,
) -> Graph: ...


@by_granularity("granularity")
def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    granularity: Literal["unit", "weight", "expert", "block", "head_size", "rank"] = "unit",
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    allow_inexact: bool = False,
    forward: Forward | None = None,
) -> Any:
    """Find what can be removed from a model, and what has to go together.

    Experts of a mixture are found by their structure: a list of equal modules, or a module whose parameters
    have the experts along axis 0, next to a router with one row for each expert. The model need not be
    captured. One forward pass records the inputs of each block. Then experts are removed from a float64 copy
    of the block. The copy has to give what the dense block gives when its router may not choose them. On the
    meta device this cannot be tried, and ``graph.proven`` is False.

    Residual blocks are found by what one forward pass shows: an entry of a list or sequence of modules,
    called once, which adds what it computes to a tensor that it reads. Each is removed from a float64 copy of
    the model, which has to give what the dense model gives with the block bypassed.

    Args:
        model: Any module that `torch.export` can capture; it is left as it was.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments. Only
            single weights need none. Tensors are moved to the model's device. The first axis is taken as the
            batch. The model is also run at other sizes of every axis, to learn which may vary
            (``graph.inputs``). What the graph says holds at all of them.
        granularity: What may be removed. ``unit``: channels, neurons, heads, hidden units. ``expert``: whole
            experts; then `more_inputs`, `methods` and `allow_inexact` are refused, since they mean nothing.
            ``weight``: single weights of linear layers and convolutions; then only the model is needed.
            ``block``: whole residual blocks, with the options of experts and `more_inputs`: each block is
            tried on all of them. ``head_size``: dimensions of attention heads, those of queries with keys
            and those of values, the same number in each head of a layer; what a rotary embedding turns
            together goes together. ``["unit", "head_size"]``: these, and all units but whole heads. ``rank``:
            directions of linear layers, which become two layers each; of a model that `secateur.factorise`
            returned. ``["unit", "rank"]``: these and all units. ``["unit", "expert"]``, ``["unit",
            "block"]``, ``["unit", "head_size", "block"]``: both, with costs that depend on both.
        more_inputs: Further inputs, each like `example_inputs`. If only their sizes differ, the axes in which
            they differ may vary. If they are of another kind (one mask more, another number of axes,
            ``{"x": x, "mode": "fast"}``), the model is captured with them too, and the result is right for
            all of them.
        methods: Names of further methods that take the same inputs and must work after pruning, such as
            ``"embed"``. A layer that only a method not named here reads keeps all its inputs.
        allow_inexact: Also offer groups whose units are mixed by an operator without weights, for example by
            a layer norm over channels. Removing such a unit changes what the others compute.
        forward: A function ``forward(model, batch)`` that calls the model. Then `example_inputs` may be a
            batch of any kind, as a loader gives it.

    Returns:
        A `Graph`: the groups, what is frozen and why, and what any choice of units costs. For experts an
        `ExpertGraph`: a group for each block; ``graph.left`` says which blocks stay whole, and why. For
        residual blocks a `secateur.targets.blocks.graph.BlockGraph`: a group for each part of the model. For
        units with experts or blocks a `secateur.targets.together.graph.Joined`. For
        single weights a `secateur.targets.weights.Weights`: a group for each tensor.

    Raises:
        CaptureError: If `torch.export` cannot capture the model, or the model returns no tensor. For experts:
            if the forward pass fails.
        NothingToPruneError: If no units, or no experts, may be removed.
        SettingError: If an option means nothing for this granularity; if the model is no module, is scripted
            or quantised, or has masks of `torch.nn.utils.prune`; or if the inputs are missing, of no known
            kind, or empty.

    Example:
        >>> import secateur as sc
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> [(group.name, group.size) for group in graph.groups]
        [('0', 8)]
    """
    return trace_units(
        model,
        example_inputs,
        more_inputs=more_inputs,
        methods=methods,
        allow_inexact=allow_inexact,
        forward=forward,
    )


def trace_units(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    allow_inexact: bool = False,
    forward: Forward | None = None,
    head_sizes: bool = False,
) -> Graph:
    """Trace units: see `trace`. With `head_sizes`, dimensions of attention heads in place of whole heads."""
    model = gathered(unwrap(model))
    require_plain_modes("trace", model)
    require_plain_code(model)
    require_parameters(model)
    require_no_masks(model)
    device = next((t.device for t in named_tensors(model).values()), None)
    reading = Reading(model, forward)

    def arguments(inputs: Any) -> Arguments:
        return call_arguments(inputs if forward is None else reading.inputs(inputs), device)

    given = arguments(example_inputs)
    spec = InputSpec.of(*given, model)  # refuses what no plan could hold before anything takes time
    if batch_size(given) == 0 and spec.tensors():
        raise SettingError(
            "trace: expected inputs of at least one sample, got none: axis 0 of the first tensor is empty. "
            "Pass a batch that is not empty."
        )
    more = [arguments(inputs) for inputs in more_inputs]
    with without_caches(model, lambda: given), old_uncollected():
        return _traced(model, given, spec, more, methods, allow_inexact=allow_inexact, head_sizes=head_sizes)


def _traced(
    model: nn.Module,
    given: Arguments,
    spec: InputSpec,
    more: list[Arguments],
    methods: Iterable[str],
    *,
    allow_inexact: bool,
    head_sizes: bool,
) -> Graph:
    """Trace a model that holds no caches.

    Args:
        model: The dense model.
        given: The user's arguments.
        spec: Their description.
        more: The user's further arguments.
        methods: Names of further methods.
        allow_inexact: See `trace`.
        head_sizes: See `trace_units`.
    """
    more += _pairs_of_kinds(model, given, spec, more)
    described = [InputSpec.of(*inputs, model) for inputs in more]
    other = [found for found in described if not found.is_like(spec)]
    kinds = [found for i, found in enumerate(other) if not any(map(found.is_like, other[:i]))]
    first = [next(a for a, d in zip(more, described, strict=True) if d is kind) for kind in kinds]
    more = [inputs for inputs, found in zip(more, described, strict=True) if found.is_like(spec)]
    names = foldable(model)
    mark, model = fingerprint(model), folded(model, names)
    also = tuple(with_sizes(k, a, Passes(model, a)) for k, a in zip(kinds, first, strict=True))
    update = {"methods": tuple(methods), "also": also, "head_sizes": head_sizes}
    spec = spec.model_copy(update=update)
    watch = FirstPass(model)
    captured = _captured(model, given, watch)
    passes = Passes(model, given, watch)
    spec = open_inputs(model, spec, given, captured[0].program, more, passes)
    graph = _graph(model, passes, given, spec, captured, allow_inexact=allow_inexact)
    if not graph.groups:
        raise nothing_to_prune(model, graph.frozen, graph.left, str(graph))
    return replace(graph, fingerprint=mark, folded=names)


def _pairs_of_kinds(
    model: nn.Module, given: Arguments, spec: InputSpec, more: Sequence[Arguments]
) -> list[Arguments]:
    """Combine the user's further inputs, two kinds at a time, where only both together make some calls."""
    kinds = [inputs for inputs in more if not InputSpec.of(*inputs, model).is_like(spec)]
    seen = set[Any]()
    for inputs in (given, *kinds) if kinds[1:] else ():
        seen |= calls_of(model, inputs) or set()
    found = []
    for (args, kwargs), (_, other) in itertools.islice(itertools.combinations(kinds, 2), PAIRS):
        switches = {k: v for k, v in other.items() if isinstance(v, bool | int | float | str | None)}
        own = {k: v for k, v in other.items() if k not in given[1] or (k in switches and v != given[1][k])}
        both = args, {**kwargs, **own}
        calls = calls_of(model, both)
        if calls is not None and not calls <= seen:
            found.append(both)
            seen |= calls
    return found


@old_uncollected()
def retrace(
    model: nn.Module,
    spec: InputSpec,
    given: Arguments,
    *,
    folds: Collection[str] = (),
    allow_inexact: bool,
    may_be_empty: bool = False,
) -> Graph:
    """Trace a model whose plan already says which sizes of inputs may vary.

    Args:
        model: The dense model.
        spec: What the first trace found about the inputs.
        given: Arguments to capture the model with, on its device.
        folds: Names of computed weights that the plan treats as parameters.
        allow_inexact: As for `trace`.
        may_be_empty: Whether a graph without groups is returned, for its program.
    """
    mark, model = fingerprint(model), folded(model, folds)
    watch = FirstPass(model)
    captured = _captured(model, given, watch)
    passes = Passes(model, given, watch)
    graph = _graph(model, passes, given, spec, captured, allow_inexact=allow_inexact)
    if not graph.groups and not may_be_empty:
        raise nothing_to_prune(model, graph.frozen, graph.left, str(graph))
    return replace(graph, fingerprint=mark, folded=tuple(folds))


def _captured(model: nn.Module, given: Arguments, first: FirstPass) -> list[Capture]:
    found = capture_branches(model, *given, first=first)
    results = found[0].program.graph.output_node().all_input_nodes
    if not any(isinstance(v.meta.get("val"), torch.Tensor) for v in results):
        raise CaptureError(
            f"trace: expected {type(model).__name__} to return tensors, got none. Return a tensor."
        )
    return found


def _named(spec: InputSpec, given: Arguments, numbers: Collection[int]) -> tuple[str, ...]:
    """Return the names of input tensors, by their numbers among all leaves of the arguments."""
    leaves = enumerate(pytree.tree_leaves(given))
    tensors = [number for number, leaf in leaves if isinstance(leaf, torch.Tensor)]
    return tuple(name for number, name in zip(tensors, spec.tensors(), strict=True) if number in numbers)


def _graph(
    model: nn.Module,
    passes: Passes,
    given: Arguments,
    spec: InputSpec,
    captured: list[Capture],
    *,
    allow_inexact: bool,
) -> Graph:
    """Make the graph of a captured model: capture its further views, label all captures, and build groups."""
    program, batch, static = captured[0].program, captured[0].batch, captured[0].static
    views, unread = further_views(model, captured, given, spec, passes)
    others = [view.program for view in views]
    others += calls_in_a_row(model, given, spec, passes)
    larger, resized = larger_arguments(spec, given, static), None
    if larger is not None and not any(view.everywhere for view in views):
        if passes.asks_the_same(given, larger):
            resized = values_at(program, model, pytree.tree_leaves(larger))
        if resized is None:  # the program has sizes as constants
            with contextlib.suppress(CaptureError):  # `verify` still runs the model at that size
                others += [one.program for one in capture_branches(model, *larger, exact=True)]
    for one in (program, *others):
        measure_sizes(one)
    state, tensors, walks = walk(program, *others, resized=resized, head_sizes=spec.head_sizes)
    keep_inputs_of(unread, state, tensors)
    assembled = assemble(state, tensors, allow_inexact=allow_inexact)
    alone = {left.group.name for left in assembled.left}
    groups = tuple(g for g in assembled.groups if g.name not in alone)
    labelled: dict[View | None, Labelled] = {None: Labelled(program, state, tuple(tensors))}
    for view, other in zip(views, walks, strict=False):  # the walk over the program at other sizes comes last
        labelled[view] = Labelled(view.program, other, tuple(tensors))
    graph = Graph(
        groups=groups,
        left=assembled.left,
        frozen=assembled.frozen,
        program=program,
        fingerprint=fingerprint(model),
        inputs=spec,
        views=tuple(views),
        static_batch=static,
        _labelled=labelled,
        _assembled=assembled,
        _costs=cost_model(assembled, state, tensors, batch),
        programs=Programs(program, model, captured[0].values),
        values=_named(spec, given, captured[0].values),
        attributes=attributes_of(model),
    )
    return graph
