"""`sc.repair`: try repairs, and keep what measurably helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.apply.copying import duplicate
from secateur.apply.record import attach, record_of, with_repairs
from secateur.calibration import Calibration, seeded
from secateur.calibration.thinning import thinned
from secateur.errors import SecateurError, SettingError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.models import unwrap
from secateur.repair.batchnorm import batch_norms, reestimate
from secateur.repair.folds import folds_of
from secateur.repair.judging import Judge, standard_errors
from secateur.repair.sweep import sweep
from secateur.score.loss import LossFn

NOTHING = "the model has nothing that it could change"


@dataclass(frozen=True)
class Work:
    """What a repair works with.

    Attributes:
        graph: Gives the trace of the dense model.
        data: Calibration data to fit on.
        progress: Whether to show bars.
    """

    graph: Callable[[], Graph]
    data: Calibration
    progress: bool = False


@dataclass(frozen=True)
class Repair:
    """A way to undo part of the damage without labels.

    Attributes:
        name: What users call it.
        run: Changes a pruned model in place. What it returns goes into the record; None says that there
            was nothing to change.
    """

    name: str
    run: Callable[[nn.Module, Work], dict[str, Any] | None]


def _batchnorm(small: nn.Module, work: Work) -> dict[str, Any] | None:
    if not batch_norms(small):
        return None
    reestimate(small, work.data, progress=work.progress)
    return {}


def _sweep(small: nn.Module, work: Work, *, name: str) -> dict[str, Any] | None:
    layers = sweep(name, small, work.graph(), work.data, progress=work.progress)
    return {"layers": layers} if layers else None


REPAIRS = {
    "reconstruct": Repair("reconstruct", partial(_sweep, name="reconstruct")),
    "variance": Repair("variance", partial(_sweep, name="variance")),
    "channelwise": Repair("channelwise", partial(_sweep, name="channelwise")),
    "layerwise": Repair("layerwise", partial(_sweep, name="layerwise")),
    "bias": Repair("bias", partial(_sweep, name="bias")),
    "batchnorm": Repair("batchnorm", _batchnorm),
}
"""Name -> repair."""

AUTO = (
    ("batchnorm",),
    ("bias",),
    ("variance",),
    ("variance", "batchnorm"),
    ("reconstruct",),
    ("reconstruct", "batchnorm"),
)
"""The combinations that ``auto`` compares; a tie goes to the earlier one."""

HEAT = 64
"""Where there is plenty of data, all combinations run on about so many samples first, ..."""

PLENTY = 4
"""... that is, where there are so many times as many, and as many others judge; ..."""

FINALISTS = 2
"""... and so many run on all of it, ..."""

MARGIN = 3.0
"""... or fewer, if all others are more standard errors than this behind."""


def resolve(
    methods: str | Sequence[str] | None, own: Mapping[str, Repair] | None = None
) -> tuple[tuple[Repair, ...], ...]:
    """Combinations to compare: none, all of ``auto``, or the one that was asked for.

    Args:
        methods: As for `repair`.
        own: Further repairs by name.

    Raises:
        SettingError: If a name is unknown.
    """
    if methods is None:
        return ()
    if methods == "auto":
        return tuple(tuple(REPAIRS[name] for name in names) for names in AUTO)
    names = (methods,) if isinstance(methods, str) else tuple(methods)
    known = REPAIRS | dict(own or {})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingError(
            f"repair: expected None, 'auto' or names among {', '.join(known)}, got {unknown[0]!r}."
        )
    return (tuple(known[name] for name in names),) if names else ()


def repair(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: str | Sequence[str] | None = "auto",
    *,
    own: Mapping[str, Repair] | None = None,
    graph: Graph | None = None,
    loss_fn: LossFn | None = None,
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

    Args:
        small: What `apply` returned, in any form; it is left as it was. Zeros of a mask stay zero.
        model: The dense model.
        calibration: What `Calibration.of` takes; labels are not needed.
        methods: ``auto`` compares combinations and takes the best; a name; several, which are done in
            order, each where it helps; or None.
        own: Further repairs by name, which `methods` may name.
        graph: The trace of `model`, if at hand; it saves tracing again.
        loss_fn: As for `score`; it judges instead of the distance.
        seed: For shuffling loaders.
        progress: Show bars on a terminal.

    Returns:
        A new model; `secateur.record_of(result).repairs` says what was tried and what it brought.

    Raises:
        SettingError: If a method is unknown.
        ArtifactError: If `small` did not come from `apply`.
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
    folds = folds_of(Calibration.of(calibration, seed=seed))
    traced = [] if graph is None else [graph]

    def the_graph() -> Graph:
        if not traced:
            first = folds[-1][0].first()
            exact = all(group.exact for group in plan.groups)
            traced.append(trace(model, first.kwargs or first.args, allow_inexact=not exact))
        return traced[0]

    with seeded(seed):
        trials = _Trials(
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


@dataclass(frozen=True, eq=False)
class _Trial:
    """A model for each fold, and how they measure; `notes` say what was done to the last."""

    models: list[nn.Module]
    errors: NDArray[np.float64]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The mean."""
        return float(self.errors.mean())

    def better_than(self, other: _Trial) -> bool:
        """Whether it measures better; what is not finite never does."""
        return math.isfinite(self.error) and (self.error < other.error or not math.isfinite(other.error))


class _Trials:
    def __init__(self, folds: Sequence[tuple[Work, Judge]]) -> None:
        self.folds = folds

    def measured(self, models: list[nn.Module], notes: dict[str, Any] | None = None) -> _Trial:
        """Each model judged on what its fold holds out."""
        errors = np.concatenate([judge(m) for m, (_, judge) in zip(models, self.folds, strict=True)])
        return _Trial(models, errors, notes or {})

    def attempt(self, start: _Trial, method: Repair) -> _Trial | str:
        """The repaired models, or why there are none."""
        models, notes = [], None
        for model, (work, _) in zip(start.models, self.folds, strict=True):
            candidate = duplicate(model)
            try:
                notes = method.run(candidate, work)
            except SecateurError as error:
                return str(error)
            models.append(candidate)
        return NOTHING if notes is None else self.measured(models, notes)

    def part(self) -> _Trials | None:
        """Trials on a part of the data that is enough to tell good from bad; None if there is little more."""
        (work, judge), *more = self.folds
        samples = 0 if more else sum(batch.size for batch in work.data)
        if samples < PLENTY * HEAT:
            return None
        whole = work.graph().static_batch is not None
        few = thinned(work.data, HEAT / samples, whole=whole)
        return _Trials([(replace(work, data=few, progress=False), judge.on_part(HEAT, whole=whole))])

    def best(
        self, start: _Trial, combinations: tuple[tuple[Repair, ...], ...]
    ) -> tuple[tuple[tuple[Repair, ...], ...], list[dict[str, Any]]]:
        """The best combinations that none is clearly better than, and the record of the others."""
        done = self.results(start, combinations)
        names = [tuple(method.name for method in methods) for methods in combinations]
        trials = {k: found for k, n in enumerate(names) if isinstance(found := done[n], _Trial)}
        order = sorted(trials, key=lambda k: e if math.isfinite(e := trials[k].error) else math.inf)
        stay = {
            k
            for k in order[:FINALISTS]
            if not standard_errors(trials[k].errors - trials[order[0]].errors) > MARGIN
        }
        behind = [
            self._entry(" + ".join(names[k]), start, done[names[k]], kept=False, layers=False)
            | {"fitted_on": HEAT}
            for k in (*order, *sorted({*range(len(names))} - {*order}))
            if k not in stay
        ]
        return tuple(methods for k, methods in enumerate(combinations) if k in stay), behind

    def chain(self, start: _Trial, methods: Sequence[Repair]) -> tuple[_Trial, list[dict[str, Any]]]:
        """The methods one after another, each kept if it helps."""
        best, tried = start, []
        for method in methods:
            after = self.attempt(best, method)
            helps = isinstance(after, _Trial) and after.better_than(best)
            tried.append(self._entry(method.name, best, after, kept=helps))
            if isinstance(after, _Trial) and helps:
                best = after
        return best, tried

    def results(
        self, start: _Trial, combinations: Sequence[Sequence[Repair]]
    ) -> dict[tuple[str, ...], _Trial | str]:
        """What each combination, and each beginning of one, comes to; or why to nothing."""
        done: dict[tuple[str, ...], _Trial | str] = {(): start}
        for methods in combinations:
            names: tuple[str, ...] = ()
            for method in methods:
                before, names = done[names], (*names, method.name)
                if names not in done:
                    done[names] = before if isinstance(before, str) else self.attempt(before, method)
        return done

    def compare(
        self, start: _Trial, combinations: Sequence[Sequence[Repair]]
    ) -> tuple[_Trial, list[dict[str, Any]]]:
        """The best of several combinations, or `start` if none is better."""
        done = self.results(start, combinations)
        names = [tuple(method.name for method in methods) for methods in combinations]
        best = start
        chosen: tuple[str, ...] = ()
        for name in names:
            after = done[name]
            if isinstance(after, _Trial) and after.better_than(best):
                best, chosen = after, name
        return best, [self._entry(" + ".join(n), start, done[n], kept=n == chosen) for n in names]

    def _entry(
        self, name: str, before: _Trial, after: _Trial | str, *, kept: bool, layers: bool = True
    ) -> dict[str, Any]:
        """What the record says of one trial, with or without each layer of it."""
        if isinstance(after, str):
            return {"method": name, "kept": False, "why": after}
        return {
            "method": name,
            "kept": kept,
            "measure": self.folds[0][1].measure,
            "before": before.error,
            "after": after.error,
            "held_out_samples": sum(judge.samples for _, judge in self.folds),
            **{key: value for key, value in after.notes.items() if layers or key != "layers"},
        }


def flush_subnormals(model: nn.Module) -> None:
    """Set stored values too small for the dtype's normal range to zero: CPUs compute with them slowly.

    Half precision is left alone: its small values matter, and are computed with in single precision.
    """
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dtype in (torch.float32, torch.float64):
                tensor[tensor.abs() < torch.finfo(tensor.dtype).tiny] = 0
