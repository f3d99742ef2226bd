"""From a model to its graph: capture, then labels, then groups."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from secateur.calibration.reading import Forward, Reading
from secateur.common.models import named_tensors, unwrap
from secateur.common.modes import require_plain_modes
from secateur.errors import CaptureError, SettingError
from secateur.graph.assemble import assemble, cost_model
from secateur.graph.capture import capture, require_parameters
from secateur.graph.datasizes import measure_sizes
from secateur.graph.folding import foldable, folded
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.inputs import Arguments, InputSpec, batch_size, call_arguments
from secateur.graph.kept import Labelled
from secateur.graph.nothing import nothing_to_prune, require_no_masks, require_plain_code
from secateur.graph.openaxes import larger_arguments, open_inputs, with_sizes
from secateur.graph.passes import Passes
from secateur.graph.programs import Programs, values_at
from secateur.graph.views import View, further_views
from secateur.graph.walk import keep_inputs_of, walk
from secateur.targets.granularity import by_granularity

if TYPE_CHECKING:
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
def trace(model: nn.Module, *, granularity: Literal["weight"]) -> Weights: ...


@overload
def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    granularity: Literal["unit"] = "unit",
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
    granularity: Literal["unit", "weight", "expert"] = "unit",
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    allow_inexact: bool = False,
    forward: Forward | None = None,
) -> Any:
    """Find what can be removed from a model, and what has to go together.

    Experts of a mixture are found by their structure: a list of equal modules, or a module whose parameters
    have the experts along axis 0, and beside it a router with a row for each. The model need not be captured.
    One forward pass shows what reaches each block; then experts are removed from a float64 copy of it, which
    has to give what the dense block gives when its router may not choose them. On the meta device nothing can
    be tried, and ``graph.proven`` is False.

    Args:
        model: Any module that `torch.export` can capture; it is left as it was.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments; required
            except for single weights. Tensors are moved to the model's device. The first axis is taken as
            the batch. The model is also run at other sizes of every axis, to learn which may vary
            (``graph.inputs``); what is found to go together holds at both sizes.
        granularity: What may be removed. ``unit``: channels, neurons, heads, hidden units. ``expert``: whole
            experts; then `more_inputs`, `methods` and `allow_inexact` mean nothing, and are refused.
            ``weight``: single weights of linear layers and convolutions; then only the model is needed.
        more_inputs: Further inputs of other sizes, as in `example_inputs`: the axes in which they differ may
            vary, at these sizes; the other axes are tried. Inputs of another kind (a mask more, another
            number of axes, ``{"x": x, "mode": "fast"}``) are captured too, so that the result is right for
            both.
        methods: Names of further methods of the model, such as ``"embed"``, which take the same inputs and
            are to work after pruning. Without this, what only they read keeps its inputs whole.
        allow_inexact: Also offer groups whose units an operator mixes without weights (a layer norm
            over channels, for example): removing some changes what the others compute.
        forward: ``forward(model, batch)`` calls the model on `example_inputs`, which then may be anything:
            a batch as the loader gives it.

    Returns:
        The groups, what is frozen and why, and a cost model. For experts an `ExpertGraph`: a group for each
        block, and ``graph.left`` says which blocks stay whole and why. For single weights a
        `secateur.targets.weights.Weights`: a group for each tensor.

    Raises:
        CaptureError: If `torch.export` cannot capture the model, or it returns no tensor. Experts: if the
            forward pass fails.
        NothingToPruneError: If no group of units may be removed, or there are no experts that may go.
        SettingError: If an option means nothing for this granularity; if the model is no module, is scripted
            or quantised, or has masks of `torch.nn.utils.prune` on; or if the inputs are missing, of no known
            kind, or empty.

    Example:
        >>> import secateur as sc
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> [(group.name, group.size) for group in graph.groups]
        [('0', 8)]
    """
    model = unwrap(model)
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
    described = [InputSpec.of(*inputs, model) for inputs in more]
    other = [found for found in described if not found.is_like(spec)]
    kinds = [found for i, found in enumerate(other) if not any(map(found.is_like, other[:i]))]
    first = [next(a for a, d in zip(more, described, strict=True) if d is kind) for kind in kinds]
    more = [inputs for inputs, found in zip(more, described, strict=True) if found.is_like(spec)]
    names = foldable(model)
    mark, model = fingerprint(model), folded(model, names)
    also = tuple(with_sizes(k, a, Passes(model, a)) for k, a in zip(kinds, first, strict=True))
    spec = spec.model_copy(update={"methods": tuple(methods), "also": also})
    program, batch, static = _captured(model, given)
    passes = Passes(model, given)
    spec = open_inputs(model, spec, given, program, more, passes)
    graph = _graph(model, passes, given, spec, program, batch, static, allow_inexact=allow_inexact)
    return replace(graph, fingerprint=mark, folded=names)


def retrace(
    model: nn.Module, spec: InputSpec, given: Arguments, *, folds: Collection[str] = (), allow_inexact: bool
) -> Graph:
    """`trace` of a model for which it is known what may vary: from a plan.

    Args:
        model: The dense model.
        spec: What the first trace found.
        given: Arguments, on the model's device.
        folds: Weights that the plan folded.
        allow_inexact: As for `trace`.
    """
    mark, model = fingerprint(model), folded(model, folds)
    program, batch, static = _captured(model, given)
    passes = Passes(model, given)
    graph = _graph(model, passes, given, spec, program, batch, static, allow_inexact=allow_inexact)
    return replace(graph, fingerprint=mark, folded=tuple(folds))


def _captured(model: nn.Module, given: Arguments) -> tuple[ExportedProgram, int, int | None]:
    program, batch, static, _ = capture(model, *given)
    results = program.graph.output_node().all_input_nodes
    if not any(isinstance(v.meta.get("val"), torch.Tensor) for v in results):
        raise CaptureError(
            f"trace: expected {type(model).__name__} to return tensors, got none. Return a tensor."
        )
    return program, batch, static


def _graph(
    model: nn.Module,
    passes: Passes,
    given: Arguments,
    spec: InputSpec,
    program: ExportedProgram,
    batch: int,
    static: int | None,
    *,
    allow_inexact: bool,
) -> Graph:
    views, unread = further_views(model, program, given, spec, passes, batch)
    others = [view.program for view in views]
    larger, resized = larger_arguments(spec, given, static), None
    if larger is not None and not any(view.everywhere for view in views):
        if passes.asks_the_same(given, larger):
            resized = values_at(program, model, pytree.tree_leaves(larger))
        if resized is None:  # the program holds sizes
            with contextlib.suppress(CaptureError):  # `verify` still runs the model at that size
                others.append(capture(model, *larger).program)
    for captured in (program, *others):
        measure_sizes(captured)
    state, tensors, learnt = walk(program, *others, resized=resized)
    keep_inputs_of(unread, state, tensors)
    assembled = assemble(state, tensors, allow_inexact=allow_inexact)
    alone = {left.group.name for left in assembled.left}
    groups = tuple(g for g in assembled.groups if g.name not in alone)
    labelled: dict[View | None, Labelled] = {None: Labelled(program, state, tuple(tensors))}
    for view, also in zip(views, learnt, strict=False):  # what was learnt at other sizes comes last
        labelled[view] = Labelled(view.program, also, tuple(tensors))
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
        programs=Programs(program, model),
    )
    if not groups:
        raise nothing_to_prune(model, assembled.frozen, assembled.left, str(graph))
    return graph
