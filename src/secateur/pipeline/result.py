"""The result of `prune`, and functions that collect the data of its report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.allocators import Budget
from secateur.calibration import Batch
from secateur.common.models import device_of, evaluating
from secateur.common.outputs import tensors_of
from secateur.errors import NothingToPruneError, SecateurError, SettingError
from secateur.graph.graph import Graph
from secateur.measure.cost import Cost, weight_bytes
from secateur.measure.evaluate import Evaluation
from secateur.measure.latency.timing import latency
from secateur.pipeline.bounds.frontier import Frontier, Point
from secateur.pipeline.quantise import Quantised
from secateur.proof.verify import Proof
from secateur.repairs.methods import Methods, listed, name_of_repair
from secateur.report.data import Figures, Kept
from secateur.report.report import Report
from secateur.signals import Scores
from secateur.signals.loss import LossFn, default_loss

_TIMED_SECONDS = 20
"""Time for the latency of both models. Models that take longer run five times each."""

_PROOF_SAMPLES = 4
"""Number of calibration samples that the proof runs on. It is in float64, so any sample shows an error."""


@dataclass(frozen=True, eq=False)
class Result:
    """What `prune` returns.

    Attributes:
        model: The new, smaller model.
        plan: The plan; a `MaskPlan` for single weights.
        scores: The scores. Allocators can make further plans from them, without the data.
        graph: The trace; an `ExpertGraph` for experts.
        report: The report: ``print(result)``, ``.report.to_html(path)``, ``.report.to_json(path)``.
        quantised: The quantised model as an ONNX file; None without the option `quantise`.
    """

    model: nn.Module
    plan: Any = field(repr=False)
    scores: Scores
    graph: Any = field(repr=False)
    report: Report = field(repr=False)
    quantised: Quantised | None = field(default=None, repr=False)
    _at: Callable[[float], Result] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.report)

    @property
    def frontier(self) -> Frontier | None:
        """The models that were measured on held-out data, by cost; None if none was.

        They are those that a bound on quality needed, and those that the option `frontier` asked for.
        """
        return self.report.frontier

    def at(self, point: Point | float) -> Result:
        """Make the model of a point of the frontier, or of any share of the cost, without scoring again.

        Args:
            point: An entry of ``frontier.points``, or the share of the cost to keep, in (0, 1).

        Returns:
            The whole result for that plan: what `prune` returns for a budget of that share.

        Raises:
            SettingError: This result was not made by `prune`.
            UnreachableBudgetError: No plan keeps so little.
        """
        if self._at is None:
            raise SettingError(
                "Result.at: expected a result that secateur.prune returned, got one made by "
                "hand. Call prune with a budget instead."
            )
        return self._at(point if isinstance(point, float) else point.share)


@contextmanager
def clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that the block takes to the phase's seconds."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def few(batch: Batch, static: int | None) -> Any:
    """Return a few of the batch's samples as inputs; all of them if the program has a fixed batch size."""
    return batch.first(static or _PROOF_SAMPLES).inputs


def traced_on_few(trace: Callable[[Any], Any], batch: Batch) -> Any:
    """Trace a model on a few samples of a batch: the checks of `apply` run it on these many times.

    On all samples, if it cannot be traced on fewer, or the program would have their number fixed.

    Args:
        trace: Traces the model on the inputs that it is given.
        batch: The batch. It may be one that cannot be cut.
    """
    part = batch.first(_PROOF_SAMPLES)
    if part.size < batch.size:
        try:
            graph = trace(part.inputs)
        except NothingToPruneError:
            raise
        except SecateurError:  # said below, of the whole batch
            pass
        else:
            if graph.static_batch is None:
                return graph
    return trace(batch.inputs)


@torch.no_grad()
def check_labels(model: nn.Module, batch: Batch, loss_fn: LossFn | None) -> None:
    """Check early that the loss of the labels can be computed, before the slow steps.

    If the model does not run or returns no tensor, nothing is checked: `trace` raises an error for that.

    Raises:
        CalibrationError: The labels do not fit the model's outputs.
    """
    if loss_fn is None and batch.labels is not None:
        own = batch.to(device_of(model))
        with evaluating(model):
            try:
                output = own.run(model, labelled=True)
            except Exception:  # a user's forward may fail in any way
                return
        if tensors_of(output):
            default_loss(output, own)


def proof_entry(proof: Proof) -> dict[str, Any]:
    """Return a proof as plain data for the report."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(proof)))  # lists for tuples
    return {**found, "proven": proof.proven}


def figures(
    stages: list[tuple[str, nn.Module]],
    measured: list[Evaluation],
    costs: tuple[Cost, Cost],
    example: Batch,
    *,
    measure_latency: bool,
) -> tuple[Figures, ...]:
    """Return cost and quality of each stage: dense, pruned and, if a repair helped, repaired.

    Args:
        stages: Name and model of each stage.
        measured: The quality of each stage.
        costs: The cost of the dense and of the pruned model.
        example: The batch to time the models on.
        measure_latency: Whether to time the models.
    """
    times: list[dict[str, Any]] = [{} for _ in stages]
    if measure_latency:
        batch = example.to(device_of(stages[0][1]))
        # Repair changes numbers, not shapes: the repaired model runs as fast as the pruned one.
        dense, small = latency([stages[0][1], stages[1][1]], batch.args, batch.kwargs, seconds=_TIMED_SECONDS)
        times = [
            {
                "latency": t.median,
                "latency_quartiles": t.spread,
                "latency_runs": t.seconds,
                "latency_batch": t.batch,
            }
            for t in (dense, small, small)
        ]
    return tuple(
        Figures(
            stage=stage,
            params=costs[stage != "dense"].params,
            macs=costs[stage != "dense"].macs,
            weight_bytes=weight_bytes(model),
            loss=found.loss,
            measure=found.measure,
            accuracy=found.accuracy,
            samples=found.samples,
            **timing,
        )
        for (stage, model), found, timing in zip(stages, measured, times, strict=False)
    )


def report_settings(
    budget: Budget | None,
    allocator: str,
    granularity: str,
    repair: Methods,
    form: str,
    seed: int,
    *,
    loss: str = "default",
    **further: bool | int | float | str | None,
) -> dict[str, Any]:
    """Return the arguments of a call as plain data for the report; `further` are optional ones."""
    repairs = repair
    if repair is not None and not isinstance(repair, str):
        repairs = [name_of_repair(each) for each in listed(repair)]
    return {
        "budget": budget.as_settings() if budget else None,
        "allocator": allocator,
        "granularity": granularity,
        "repair": repairs,
        "form": form,
        "seed": seed,
        "loss": loss,
        **further,
    }


def scored_on(scores: Scores) -> dict[str, int]:
    """Return the number of samples and classes that were scored, for the report; nothing that is 0."""
    return {name: count for name in ("samples", "classes") if (count := getattr(scores, name))}


def untouched(graph: Graph) -> tuple[Kept, ...]:
    """Return the parts of the model that could not be pruned, with the reasons."""
    left = [Kept(what=entry.group.name, reason=entry.reason) for entry in graph.left]
    frozen = [Kept(what=f"{f.tensor} axis {f.axis}", reason=f.reason, where=f.where) for f in graph.frozen]
    return (*left, *frozen)
