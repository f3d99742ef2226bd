"""`sc.repair`: try repairs, and keep those that lower the measured error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from secateur.calibration import Calibration, Forward, seeded
from secateur.common.caches import without_caches
from secateur.common.mapped import any_mapped
from secateur.common.models import device_of, named_tensors, unwrap
from secateur.common.modes import require_plain_modes
from secateur.graph.graph import Graph
from secateur.graph.trace import trace_units
from secateur.repairs import resuming
from secateur.repairs.judging import Judge
from secateur.repairs.methods import Method, Methods, Work, resolve
from secateur.repairs.polish import Polish
from secateur.repairs.trials import FINALISTS, Trials
from secateur.signals.distributed import team_of_processes
from secateur.signals.loss import LossFn
from secateur.targets.granularity import by_granularity
from secateur.targets.units.copying import duplicate
from secateur.targets.units.record import attach, record_of, with_repairs
from secateur.targets.units.spread import gathered

if TYPE_CHECKING:
    from secateur.targets.blocks.graph import BlockGraph
    from secateur.targets.experts.graph import ExpertGraph

FEW = 50
"""With at most this many samples, one fifth is too few to judge on, so cross-validation is used."""

FOLDS = 5
"""Number of folds; one fold is held out to judge on."""


@by_granularity("small")
def repair(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: Methods = "auto",
    *,
    own: Mapping[str, Method] | None = None,
    graph: Graph | ExpertGraph | BlockGraph | None = None,
    memory: int | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Reduce the error that pruning caused, without labels.

    Each method is fitted on four fifths of the batches. The rest judges it: by the distance to the dense
    model's outputs, or by `loss_fn` (`secateur.repairs.judging`). A repair that does not lower this error is
    undone, so the result never measures worse than the input. With at most 50 samples each fifth is held
    out in turn, and the mean over the five judges; what helps is then fitted on all samples. That takes six
    fits, so if the weights lie in files, where a fit takes long, one fifth is held out once. With many
    samples, ``auto`` first compares all combinations on a part of the data, and then the best one or two on
    all of it.

    The methods:

    - ``reconstruct``: refit weight and bias of each layer to the dense layer's outputs, by least squares.
    - ``variance``: scale and shift each output. The less of the output is signal, the closer its factor
      is to 1.
    - ``channelwise``: scale each output to the dense variance, and shift it.
    - ``layerwise``: scale each layer by one factor, and shift each output.
    - ``bias``: shift each output to the dense mean.
    - ``batchnorm``: measure the running statistics of batch norms again.
    - ``polish``: train the model to give the dense outputs and features (`secateur.Polish`). It takes
      minutes, so ``auto`` leaves it out. Ask for ``["reconstruct", "polish"]``. With a language model the
      divergence of the words' probabilities then judges both, in place of the distance.

    All but ``batchnorm`` and ``polish`` go through the layers in order of execution. Each layer is fitted to
    the inputs that the layers before it give after their own repair.

    A model without some of its blocks is repaired in the same ways: every layer behind a dropped block is
    refitted, and where a layer adds to the stream, so that the stream after it is the dense one.

    A model without some of its experts has two repairs. ``experts`` refits the down-projections of the kept
    experts to the output of the dense block. ``merge`` averages each removed expert into the nearest one that
    stayed, as far as that brings a block nearer to the dense one on held-out tokens; it comes alone or before
    ``experts``. See the guide to mixtures of experts for the formulas. Held-out tokens choose the damping,
    and experts that it does not help are not changed.

    Args:
        small: The pruned model that `apply` returned, in any form. It is not changed. Weights that a mask
            set to zero stay zero.
        model: The dense model.
        calibration: Anything that `Calibration.of` accepts. Labels are not needed.
        methods: ``auto`` compares combinations and takes the best. A name runs one method. Several names
            run in order, and each is kept if it helps. In place of a name, a `Polish` with options. None
            repairs nothing.
        own: Your own repairs by name, which `methods` may name. Not for experts.
        graph: The trace of `model`. If given, the model is not traced again.
        memory: For experts only: most bytes for sums, by default ``2**31``. With less, the data are read
            several times, each time for some of the experts.
        loss_fn: As for `score`. It replaces the distance as the error. Not for experts.
        forward: As for `score`.
        seed: Seed for shuffling loaders.
        progress: Show progress bars on a terminal.

    Returns:
        A new model. `secateur.record_of(result).repairs` lists what was tried, and the error before and
        after each.

    Raises:
        SettingError: If a method is unknown, or an option means nothing for what was removed.
        ArtefactError: If `small` did not come from `apply`.
        CalibrationError: If the data is empty, or too small to hold a part out.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> small = sc.apply(net, plan)
        >>> data = [torch.randn(20, 4) for _ in range(5)]
        >>> better = sc.repair(small, net, data, "reconstruct", progress=False)
        >>> distance = [sc.evaluate(m, data, dense=net).loss for m in (small, better)]
        >>> distance[1] < distance[0]
        True
        >>> [entry["kept"] for entry in sc.record_of(better).repairs]
        [True]
    """
    traced = [] if graph is None else [cast(Graph, graph)]  # one of experts does not come here
    return run_repairs(
        small,
        model,
        calibration,
        methods,
        traced,
        own=own,
        loss_fn=loss_fn,
        forward=forward,
        seed=seed,
        progress=progress,
    )


def run_repairs(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: Methods,
    traced: list[Graph],
    *,
    own: Mapping[str, Method] | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Do what `repair` does, for any model whose tensors have the names of the dense one's.

    Args:
        small: As for `repair`.
        model: As for `repair`.
        calibration: As for `repair`.
        methods: As for `repair`.
        traced: The trace of `model`, or an empty list, to which the trace is added when a repair needs it.
        own: As for `repair`.
        loss_fn: As for `repair`.
        forward: As for `repair`.
        seed: As for `repair`.
        progress: As for `repair`.
    """
    combinations = resolve(methods, own)
    if not combinations:
        return duplicate(small)
    model = gathered(unwrap(model))
    require_plain_modes("repair", model)
    plan = record_of(small).plan
    with team_of_processes(device_of(model)) as team:
        with team.together():
            data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
            folds = folds_of(data, once=any_mapped(model.parameters()))
        with without_caches(small, lambda: data.first().arguments):
            best = bare = duplicate(small)  # new weights would not reach what it made of the old ones
        team.agree("repair", model, data, methods=methods, own=own, pruned=plan.to_json(), seed=seed)

        def graph_of_dense() -> Graph:
            """Return the trace of the dense model; trace it on first use."""
            if not traced:
                first = folds[-1][0].first()
                exact = all(group.exact for group in plan.groups)
                sizes = plan.inputs.head_sizes
                traced.append(trace_units(model, first.inputs, allow_inexact=not exact, head_sizes=sizes))
            return traced[0]

        with seeded(seed):
            by_scores = None if methods == "auto" else _by_scores(combinations[0])
            judges = [(fit, Judge(model, held, loss_fn, by_scores=by_scores)) for fit, held in folds]
            share = 1 / len(folds)
            trials = Trials(
                [(Work(graph_of_dense, fit, progress, judge, share), judge) for fit, judge in judges]
            )
            start = trials.measured([best] * len(folds))
            if methods == "auto":
                rejected: list[dict[str, Any]] = []
                part = trials.part()
                if part is not None and len(combinations) > FINALISTS:
                    combinations, rejected = part.best(part.measured([best]), combinations)
                result, tried = trials.compare(start, combinations)
                tried += rejected
            else:
                result, tried = trials.chain(start, combinations[0])
            best = result.models[-1]
            # Cross-validation has judged the methods, so no data need be held out any more.
            if len(folds) > 1 and result.methods and not any(method.trains for method in result.methods):
                best, notes = duplicate(bare), {}
                for method in result.methods:
                    notes[method.name] = resuming.run(method, best, Work(graph_of_dense, data, progress))
                for entry in tried:
                    if entry["kept"]:
                        *_, last = entry["method"].split(" + ")
                        entry.update({**(notes[last] or {}), "fitted_on_all": True})
        flush_subnormals(best)
        attach(best, record_of(small))
        return with_repairs(best, tried)


def _by_scores(methods: Sequence[Method]) -> bool | None:
    """Whether a repair was told to lower the divergence of class scores, or not to. None: not told."""
    told = (method.divergence for method in methods if isinstance(method, Polish))
    return next((choice for choice in told if choice is not None), None)


def flush_subnormals(model: nn.Module) -> None:
    """Set subnormal values (below the dtype's smallest normal number) of all tensors to zero, in place.

    CPUs are slow with subnormal numbers. Half precision is not changed: its small values matter, and CPUs
    compute with them in single precision, where they are normal.
    """
    with torch.no_grad():
        for tensor in named_tensors(model).values():
            if tensor.dtype in (torch.float32, torch.float64):
                tensor[tensor.abs() < torch.finfo(tensor.dtype).tiny] = 0


def folds_of(data: Calibration, *, once: bool = False) -> list[tuple[Calibration, Calibration]]:
    """Split the data into pairs (data to fit on, held-out data).

    Args:
        data: The data.
        once: Make one pair, however few the samples are.

    Returns:
        One pair, ``data.split()``, if there are more than `FEW` samples. Otherwise `FOLDS` pairs for
        cross-validation, of which the last is ``data.split()``.

    Raises:
        CalibrationError: If the data is empty, or too small to hold a part out.
    """
    last = data.split(FOLDS)
    if once:
        return [last]
    batches = []
    samples = 0
    for batch in data.plain:
        batches.append(batch)
        samples += batch.size
        if samples > FEW:
            return [last]
    count = -(-FOLDS // len(batches))  # pieces per batch, so that there are at least FOLDS pieces
    pieces = [piece.raw for batch in batches for piece in (batch.cut(count) if count > 1 else [batch])]
    if len(pieces) < FOLDS:
        return [last]

    def part(fold: int, held: bool) -> Calibration:
        chosen = [raw for k, raw in enumerate(pieces) if (k % FOLDS == fold) == held]
        return replace(data, source=chosen, _start=())

    return [*((part(k, held=False), part(k, held=True)) for k in range(FOLDS - 1)), last]
