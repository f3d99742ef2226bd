"""`sc.repair`: try repairs, and keep what measurably helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from secateur.apply.copying import duplicate
from secateur.apply.record import attach, record_of, with_repairs
from secateur.calibration import Calibration, Forward, seeded
from secateur.granularity import by_granularity
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.models import named_tensors, unwrap
from secateur.modes import require_plain_modes
from secateur.repair.judging import Judge
from secateur.repair.methods import Repair, Work, resolve
from secateur.repair.trials import FINALISTS, Trials
from secateur.score.loss import LossFn

if TYPE_CHECKING:
    from secateur.experts.graph import ExpertGraph

FEW = 50
"""Up to this many samples, a fifth of them says too little: every fifth judges in turn."""

FOLDS = 5


@by_granularity("small")
def repair(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: str | Sequence[str] | None = "auto",
    *,
    own: Mapping[str, Repair] | None = None,
    graph: Graph | ExpertGraph | None = None,
    memory: int | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Undo what can be undone of the damage that pruning did, without training.

    Each method works on four fifths of the batches and is judged on the rest: by the distance to the dense
    model's outputs, or by `loss_fn` (`secateur.repair.judging`). What does not lower that is taken back, so
    the result never measures worse than what came in. Where the samples are few, a fifth of them is too few
    to judge on: then each fifth is left out in turn, and their mean judges. Where they are plenty, ``auto``
    first compares all combinations on a part, and then the best, or the best two, on all.

    Methods that refit layers go through the network in order and set each layer right, given those
    before it: ``reconstruct`` by least squares towards the dense layer's outputs, ``variance`` by a
    factor and a shift of each output, the factor nearer to one the less of the output is signal,
    ``channelwise`` by the plain factor, ``layerwise`` by one factor a layer, ``bias`` by a shift.
    ``batchnorm`` measures running statistics anew.

    A model without some of its experts has one repair, ``experts``: it refits the down-projections of those
    that stayed to what the dense block gives. See the guide to mixtures of experts for the formula. Held-out
    tokens choose the damping, and experts that it does not help stay as they are.

    Args:
        small: What `apply` returned, in any form; it is left as it was. Zeros of a mask stay zero.
        model: The dense model.
        calibration: What `Calibration.of` takes; labels are not needed.
        methods: ``auto`` compares combinations and takes the best; a name; several, which are done in
            order, each where it helps; or None.
        own: Further repairs by name, which `methods` may name. Not for experts.
        graph: The trace of `model`, if at hand; it saves tracing again.
        memory: For experts alone: most bytes for sums, by default ``2**31``. With less, the data are read
            several times, each time for some experts.
        loss_fn: As for `score`; it judges instead of the distance. Not for experts.
        forward: As for `score`.
        seed: For shuffling loaders.
        progress: Show bars on a terminal.

    Returns:
        A new model; `secateur.record_of(result).repairs` says what was tried and what it brought.

    Raises:
        SettingError: If a method is unknown, or an option means nothing for what was removed.
        ArtefactError: If `small` did not come from `apply`.
        CalibrationError: If the data is empty, or too little to hold some out.

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
    plan = record_of(small).plan
    combinations = resolve(methods, own)
    best = duplicate(small)
    if not combinations:
        return best
    model = unwrap(model)
    require_plain_modes("repair", model)
    folds = folds_of(Calibration.of(calibration, seed=seed, forward=forward, model=model))
    traced = [] if graph is None else [cast(Graph, graph)]  # one of experts does not come here

    def the_graph() -> Graph:
        if not traced:
            first = folds[-1][0].first()
            exact = all(group.exact for group in plan.groups)
            traced.append(trace(model, first.inputs, allow_inexact=not exact))
        return traced[0]

    with seeded(seed):
        trials = Trials(
            [(Work(the_graph, fit, progress), Judge(model, held, loss_fn)) for fit, held in folds]
        )
        start = trials.measured([best] * len(folds))
        if methods == "auto":
            behind: list[dict[str, Any]] = []
            part = trials.part()
            if part is not None and len(combinations) > FINALISTS:
                combinations, behind = part.best(part.measured([best]), combinations)
            result, tried = trials.compare(start, combinations)
            tried += behind
        else:
            result, tried = trials.chain(start, combinations[0])
    best = result.models[-1]
    flush_subnormals(best)
    attach(best, record_of(small))
    return with_repairs(best, tried)


def flush_subnormals(model: nn.Module) -> None:
    """Set stored values too small for the dtype's normal range to zero: CPUs compute with them slowly.

    Half precision is left alone: its small values matter, and are computed with in single precision.
    """
    with torch.no_grad():
        for tensor in named_tensors(model).values():
            if tensor.dtype in (torch.float32, torch.float64):
                tensor[tensor.abs() < torch.finfo(tensor.dtype).tiny] = 0


def folds_of(data: Calibration) -> list[tuple[Calibration, Calibration]]:
    """Pairs of data to fit on and held-out data; the last is ``data.split()``, and mostly the only one.

    Raises:
        CalibrationError: If the data is empty, or too little to hold some out.
    """
    last = data.split(FOLDS)
    batches = []
    samples = 0
    for batch in data.batches():
        batches.append(batch)
        samples += batch.size
        if samples > FEW:
            return [last]
    count = -(-FOLDS // len(batches))
    pieces = [piece.raw for batch in batches for piece in (batch.cut(count) if count > 1 else [batch])]
    if len(pieces) < FOLDS:
        return [last]

    def part(fold: int, held: bool) -> Calibration:
        chosen = [raw for k, raw in enumerate(pieces) if (k % FOLDS == fold) == held]
        return replace(data, source=chosen, _start=())

    return [*((part(k, held=False), part(k, held=True)) for k in range(FOLDS - 1)), last]
