"""`sc.quantise`: make a model with few bits for ONNX Runtime, and measure it beside its source."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.allocators import Budget
from secateur.artefact.export.capturing import captured
from secateur.artefact.export.checking import check, tolerance_of
from secateur.artefact.export.onnx import ONE_FILE_BYTES, onnx_runner, require_onnx, write_onnx
from secateur.artefact.export.quantising import KINDS, Feeds, OnnxModel, int4, int8
from secateur.artefact.export.trials import captured_trials
from secateur.artefact.writing import replace_bytes
from secateur.calibration import Batch, Calibration, Forward
from secateur.calibration.workers import living_workers
from secateur.common.models import device_of, evaluating, named_tensors, unwrap
from secateur.common.modes import require_numbers
from secateur.common.paths import path_named
from secateur.config.names import Quantisation
from secateur.errors import CalibrationError, ExportError, SettingError
from secateur.graph.inputs import InputSpec
from secateur.measure.cost import weight_bytes
from secateur.measure.evaluate import Evaluation, evaluate, floats_of, squared_distance
from secateur.measure.latency.timing import interleaved, stopwatch
from secateur.measure.quality import Gauge, Metric
from secateur.pipeline.quantised import Loss, QuantisedFigures, Stage
from secateur.report import quantised as words
from secateur.signals.loss import LossFn, logits_of

Stopwatch = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised model and its measurements. ``print(quantised)`` shows the table.

    Attributes:
        figures: Size, time and quality of each stage.
        content: The ONNX file.
        outputs: The names of its outputs.
    """

    figures: QuantisedFigures
    content: bytes = field(repr=False)
    outputs: tuple[str, ...]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file and return its path. An older file is replaced in one step, or stays as it is.

        Raises:
            ExportError: Nothing can be written there.
        """
        place = path_named("quantised.save", path, ExportError)
        replace_bytes(place, self.content, ExportError)
        return place

    @cached_property
    def model(self) -> OnnxModel:
        """The quantised model as a module that is called like yours, on the CPU, without gradients."""
        return OnnxModel(self.content, self.outputs)

    def __str__(self) -> str:
        """Return the table and its explanation."""
        return words.text(self.figures)


@living_workers()
def quantise(
    model: nn.Module,
    calibration: Any,
    kind: Quantisation = "int8",
    *,
    dense: nn.Module | None = None,
    evaluation: Any = None,
    metric: Metric | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    measure_latency: bool = True,
    seed: int = 0,
) -> Quantised:
    """Quantise a model for ONNX Runtime, after pruning, and measure what that costs and brings.

    The model is exported to ONNX, compared with PyTorch, and quantised by ONNX Runtime's own tools.
    ``int8``: weights and activations have 8 bits, the weights with a scale for each output channel; the
    ranges of activations are observed on the calibration data. ``int4``: the weights of matrix products have
    4 bits with a scale for every 32 of them, for language models, whose time goes into reading weights; no
    data are needed for that. Dense, pruned and quantised are then run by the same runtime on the same data.

    Args:
        model: A pruned model, or any other that `torch.export` can capture, on the CPU. It is not changed.
        calibration: As for `prune`. Quality is measured on a fifth of it, which is held out; the rest
            calibrates.
        kind: ``"int8"`` or ``"int4"``.
        dense: The dense model. If given, it gets a row of its own, and drops of quality are relative to it.
            Default: they are relative to `model`.
        evaluation: Data to measure quality on. Default: the held-out part.
        metric: As for `prune`.
        loss_fn: As for `prune`; it is called with each stage in turn.
        forward: As for `prune`.
        measure_latency: Time all stages on this machine, in turn.
        seed: Seed of the order of the data.

    Returns:
        The file's content, with `save` and `model`, and the figures of each stage.

    Raises:
        SettingError: The kind is unknown, the model is not on the CPU, or onnxruntime is missing.
        ExportError: An operator is missing in ONNX, or there is nothing to quantise.
        CaptureError: `torch.export` cannot capture the model.

    Example:
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
        >>> data = [(torch.randn(16, 8), torch.arange(16) % 3) for _ in range(5)]
        >>> done = sc.quantise(net, data, measure_latency=False)
        >>> [stage.stage for stage in done.figures.stages]
        ['model', 'model + int8']
        >>> done.model(data[0][0]).shape
        torch.Size([16, 3])
    """
    model = unwrap(model)
    data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
    fit, held = data.split()
    judged = held if evaluation is None else Calibration.of(evaluation, forward=forward, model=model)
    example = data.first()
    quantiser = Quantiser.of(model if dense is None else unwrap(dense), example, kind)
    first = "model" if dense is None else "dense"
    return quantiser(
        [] if dense is None else [("pruned", model)],
        fit,
        judged,
        first=first,
        metric=metric,
        loss_fn=loss_fn,
        timed=measure_latency,
    )


@dataclass(frozen=True, eq=False)
class Exported:
    """A model as an ONNX file that gives the same outputs.

    Attributes:
        content: The file.
        outputs: The names of its outputs.
    """

    content: bytes = field(repr=False)
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, example: Batch) -> Exported:
        """Export a model and compare the file with it."""
        if weight_bytes(model) > ONE_FILE_BYTES:
            raise ExportError(
                f"quantise: expected a model of at most {ONE_FILE_BYTES / 1e9:.1f} GB, as one ONNX file "
                f"holds, got {weight_bytes(model) / 1e9:.1f} GB. Leave quantise out."
            )
        kinds = {tensor.dtype for tensor in named_tensors(model).values() if tensor.is_floating_point()}
        if odd := kinds - {torch.float32}:
            raise ExportError(
                f"quantise: expected a model in float32, got {str(odd.pop()).removeprefix('torch.')}. Pass "
                "model.float(), with inputs in float32."
            )
        args, kwargs = example.args, dict(example.kwargs)
        found = captured(model, args, kwargs)
        given = (args, kwargs)
        trials = captured_trials(model, given, InputSpec.of(*given, model), dynamic=found.dynamic)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_onnx(found, path)
            check(path, onnx_runner(path), trials, "onnxruntime", tolerance_of(trials))
            return cls(path.read_bytes(), found.outputs)

    @property
    def model(self) -> OnnxModel:
        """A module that runs the file."""
        return OnnxModel(self.content, self.outputs)


@dataclass(frozen=True, eq=False)
class Quantiser:
    """Quantises models that were made from a dense model, which is exported first.

    Attributes:
        dense: The dense model.
        example: A batch that models are exported with and timed on.
        kind: ``int8`` or ``int4``.
        exported: The dense model as an ONNX file.
    """

    dense: nn.Module
    example: Batch
    kind: Quantisation
    exported: Exported

    @classmethod
    def of(cls, dense: nn.Module, example: Batch, kind: str, processes: int = 1) -> Quantiser:
        """Check the arguments before any slow step, and export the dense model.

        Raises:
            SettingError: There are several processes, the kind is unknown, or the model is not on the CPU.
        """
        if processes > 1:
            raise SettingError(
                f"prune(quantise={kind!r}): expected one process, got {processes}. Leave quantise out, and "
                "call secateur.quantise on the result in one process."
            )
        known = checked_kind(kind)
        require_onnx()
        require_numbers("quantise", device_of(dense))
        if device_of(dense).type != "cpu":
            raise SettingError(
                f"quantise: expected a model on the CPU, where the quantised one runs, got one on "
                f"{device_of(dense)}. Move it with model.cpu() first."
            )
        return cls(dense, example, known, Exported.of(dense, example))

    def __call__(
        self,
        made: Sequence[tuple[str, nn.Module]],
        fit: Calibration,
        judged: Calibration,
        *,
        first: str = "dense",
        budget: Budget | None = None,
        gauge: Gauge | None = None,
        metric: Metric | None = None,
        loss_fn: LossFn | None = None,
        timed: bool = True,
        seconds_of: Stopwatch | None = None,
    ) -> Quantised:
        """Quantise the last model, and measure all models.

        Args:
            made: Names and models that were made from the dense one. The last one is quantised; if there is
                none, the dense one.
            fit: The data that activations are observed on.
            judged: The data that quality is measured on.
            first: The name of the dense model's stage.
            budget: The budget. Its bounds on quality are measured, too.
            gauge: Measures these bounds. Default: made from `judged`.
            metric: As for `prune`.
            loss_fn: As for `prune`.
            timed: Whether to time the stages.
            seconds_of: Times one call. Default: the wall clock.
        """
        files = [(first, self.exported), *((name, Exported.of(m, self.example)) for name, m in made)]
        last, source = files[-1]
        runner = source.model
        fit = fit.plain
        _require_numbers(runner, judged)
        samples = 0 if self.kind == "int4" else fit.samples()
        content = (
            int4(source.content)
            if self.kind == "int4"
            else int8(source.content, (_feeds(runner, batch) for batch in fit.batches()))
        )
        files.append((f"{last} + {self.kind}", Exported(content, source.outputs)))
        models = [file.model for _, file in files]
        _require_numbers(models[-1], judged, "the quantised model")
        loss_fn = loss_fn or _own_loss(self.dense, judged.first())
        found = _evaluated(models, judged, loss_fn)
        times: list[tuple[float, ...]] = [() for _ in models]
        if timed:
            feeds = models[0].feeds(self.example.args, self.example.kwargs)
            watch = seconds_of or stopwatch(())
            times = interleaved([_call(m, feeds) for m in models], 20, 3, watch)
        gauge = gauge or Gauge(self.dense, judged, metric, loss_fn)
        return Quantised(
            QuantisedFigures(
                kind=self.kind,
                runtime=_runtime(),
                threads=torch.get_num_threads(),
                batch=self.example.size,
                calibrated=samples,
                distance=_distance(models[-1], runner, judged),
                stages=tuple(
                    Stage(
                        stage=name,
                        file_bytes=len(file.content),
                        loss=each.loss,
                        measure=each.measure,
                        accuracy=each.accuracy,
                        samples=each.samples,
                        seconds=seconds,
                    )
                    for (name, file), each, seconds in zip(files, found, times, strict=True)
                ),
                losses=tuple(_losses(gauge, models[-1], budget)),
            ),
            content,
            source.outputs,
        )


def checked_kind(kind: str) -> Quantisation:
    """Return the kind of quantisation, checked.

    Raises:
        SettingError: It is unknown.
    """
    found = next((each for each in KINDS if each == kind), None)
    if found is None:
        raise SettingError(
            f"quantise({kind!r}): expected one of {', '.join(KINDS)}, got another kind. Write 'int8'."
        )
    return found


def _losses(gauge: Gauge, model: nn.Module, budget: Budget | None) -> list[Loss]:
    """Measure how much worse a model is, by the budget's bounds on quality, or by one that suits the data."""
    bounds = () if budget is None else budget.quality
    confidence = 0.95 if budget is None else budget.confidence
    found = []
    for bound in bounds or (gauge.bound(),):
        try:
            damage = gauge(model, bound)
            low, high = damage.interval(confidence)
            most = damage.bound(confidence)
        except (CalibrationError, SettingError):
            if bounds:
                raise
            continue  # too few samples, or no measure of quality is defined: the table goes without
        found.append(
            Loss(
                bound=bound,
                measure=gauge.name(bound),
                value=damage.value,
                low=low,
                high=high,
                most=most,
                limit=getattr(budget, bound) if bounds else None,
                confidence=confidence,
            )
        )
    return found


def _feeds(model: OnnxModel, batch: Batch) -> Feeds:
    return model.feeds(batch.args, batch.kwargs)


def _require_numbers(model: OnnxModel, data: Calibration, whose: str = "the model") -> None:
    """Check that a model's outputs are no NaN: the cost of quantising could not be measured."""
    for batch in data.plain.batches():
        if any(bool(value.isnan().any()) for value in floats_of(batch.run(model), batch)):
            raise CalibrationError(
                f"quantise: expected outputs of {whose} that are numbers on the held-out data, got NaN. "
                "Check the model, and the data for values that are far too large."
            )


def _call(model: OnnxModel, feeds: Feeds) -> Callable[[], object]:
    return lambda: model.session.run(None, feeds)


def _runtime() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def _evaluated(
    models: Sequence[OnnxModel], data: Calibration, loss_fn: LossFn | None
) -> Sequence[Evaluation]:
    """Measure all models in the same way: by the loss; by the distance if an ONNX file lacks the loss."""
    try:
        return [evaluate(model, data, dense=models[0], loss_fn=loss_fn) for model in models]
    except CalibrationError:
        if loss_fn is not None or data.first().extra is None:
            raise
    inputs = [batch.kwargs for batch in data.plain.batches()]
    return [evaluate(model, inputs, dense=models[0]) for model in models]


def _distance(model: OnnxModel, other: OnnxModel, data: Calibration) -> float:
    """Return the squared distance of a model's outputs to another's, divided by the square of these."""
    error, norm = 0.0, 0.0
    for batch in data.plain.batches():
        apart, size = squared_distance(floats_of(batch.run(model), batch), floats_of(batch.run(other), batch))
        error, norm = error + float(apart.sum()), norm + float(size.sum())
    return error / (norm or 1.0)


def _own_loss(dense: nn.Module, batch: Batch) -> LossFn | None:
    """Return `next_token_loss` if the model computes just that from its labels; else None.

    An ONNX file does not compute a loss, so it must be computed from the logits. With None, the default loss
    is used, or the distance to the dense model.
    """
    if not isinstance(batch.raw, Mapping) or batch.extra is None:
        return None
    with evaluating(dense), torch.no_grad():
        output = batch.run(dense, labelled=True)
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        logits = logits_of(output)
        if not isinstance(own, Tensor) or logits is None or logits.ndim != 3 or batch.labels is None:
            return None
        ours = next_token_loss(lambda **_: logits, batch.raw)
    return next_token_loss if bool((ours - own).abs() <= 1e-4 * own.abs()) else None


def next_token_loss(model: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy of each token's logits and the next label, like language models."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = logits_of(model(**inputs))
    assert logits is not None  # noqa: S101  # known since `_own_loss`
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
