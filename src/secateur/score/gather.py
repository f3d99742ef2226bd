"""The single pass over the calibration data that serves every signal.

One forward and, if a signal needs gradients, one backward pass a batch. The captured program runs on aliases
of the model's tensors (see `secateur.score.program`), so nothing of the model can change, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from secateur.calibration import Batch, Calibration, seeded
from secateur.errors import CalibrationError, ScoreError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site
from secateur.score.loss import LossFn, check_label_range, default_loss, logits_of
from secateur.score.program import CapturedModel
from secateur.score.scores import Scores
from secateur.score.signal import Context, Signal, Step, Tally, Vector
from secateur.score.units import by_entry


@dataclass(frozen=True, eq=False)
class _Observer:
    """Who wants to see a node's value, as which group's site."""

    tally: Tally
    group: Group
    site: Site


def gather(
    graph: Graph,
    calibration: Calibration | None,
    signals: Sequence[Signal],
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score every group of `graph` with every signal, in one pass.

    Args:
        graph: From `sc.trace`.
        calibration: May be None if no signal needs data.
        signals: Instances; see `secateur.score.registry.resolve` for names.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of a batch, instead of `default_loss`.
        seed: For what signals, or the program itself, draw at random.
        progress: Show a bar on a terminal.

    Raises:
        CalibrationError: The data cannot feed what a signal needs; the message names the signal or batch.
        ScoreError: A weight is not finite, or a signal's scores are not.
    """
    by_data = [s for s in signals if s.needs - {"weights"}]
    if by_data and calibration is None:
        raise CalibrationError(
            f"signal {by_data[0].name}: expected calibration data for its "
            f"{', '.join(sorted(by_data[0].needs))}, got None. Do pass a loader, or choose "
            "a signal that reads weights alone."
        )
    # inference_mode(False): a caller's inference mode would forbid aliases that need gradients.
    with seeded(seed), torch.inference_mode(False):
        one_pass = _Pass(graph, signals, loss_fn, seed)
        samples, classes = 0, set[int]()
        if by_data and calibration is not None:
            for batch in calibration.to(one_pass.model.device).batches("Scoring", progress):
                step = one_pass.run(batch)
                samples += step.size
                if step.classes is not None:
                    classes.update(step.classes.tolist())
        values = one_pass.finish()
    scores = Scores(values, samples, len(classes), seed, graph.fingerprint)
    scores.check(graph)
    return scores


class _Pass:
    """Runs batches, and hands each signal's tally what it needs."""

    def __init__(self, graph: Graph, signals: Sequence[Signal], loss_fn: LossFn | None, seed: int) -> None:
        wanted = {
            signal.name: {name for group in graph.groups for name in signal.tensors(group)}
            for signal in signals
            if "gradients" in signal.needs
        }
        parameters = frozenset(graph.program.graph_signature.parameters)
        self._differentiable = tuple(
            name
            for name, tensor in graph.program.state_dict.items()
            if name in parameters and tensor.is_floating_point() and any(name in w for w in wanted.values())
        )
        self.model = CapturedModel(graph.program, self._differentiable)
        _check_weights(graph, self.model)
        context = Context(graph, self.model.tensors, self.model.parameters, seed)
        self._tallies = {signal.name: signal.start(context) for signal in signals}
        self._wanted = wanted
        self._loss_fn = loss_fn
        self._labels_for = next((s.name for s in signals if "labels" in s.needs), None)
        self._observers: dict[str, list[_Observer]] = {}
        for signal in signals:
            if "activations" in signal.needs:
                for group in graph.groups:
                    for site in signal.sites(group):
                        observer = _Observer(self._tallies[signal.name], group, site)
                        self._observers.setdefault(site.node, []).append(observer)
        self._open_axes = {node: self.model.open_axes(node) for node in self._observers}

    def finish(self) -> dict[str, Mapping[str, Vector]]:
        """Every signal's scores."""
        return {name: tally.finish() for name, tally in self._tallies.items()}

    def run(self, batch: Batch) -> Step:
        """One batch: forward, observations, and backward if a signal needs it."""
        classes = None
        if self._labels_for is not None:
            with _said_of(f"signal {self._labels_for}"):
                classes = batch.classes()
        step = Step(batch.index, batch.size, classes)
        for tally in self._tallies.values():
            tally.begin(step)
        with torch.set_grad_enabled(bool(self._wanted)), _said_of(f"score, batch {batch.index}"):
            output = self._forward(batch, step)
            if self._wanted:
                self._backward(output, batch, step)
        return step

    def _forward(self, batch: Batch, step: Step) -> Any:
        """Run the model on a batch; returns its output, or the loss if `loss_fn` is to call it."""
        seen: set[str] = set()

        def watcher(node: str, value: Tensor) -> None:
            if node not in seen:  # a loss_fn may call the model again: only its first call counts
                seen.add(node)
                self._observe(node, value.detach(), step)

        self.model.watch(self._observers, watcher)
        try:
            if self._loss_fn is not None and self._wanted:
                output = self._loss_fn(self.model, batch.raw)
            else:
                output = self.model(*batch.args, **batch.kwargs)
        finally:
            self.model.watch((), None)
        if len(seen) < len(self._observers):
            raise CalibrationError(
                "loss_fn: expected it to call the model it is given, got a loss without. "
                "Do compute the loss as loss_fn(model, batch) from model(...)."
            )
        for value in pytree.tree_leaves(output):
            if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                raise CalibrationError(
                    "model: expected finite outputs, got NaN. Do check the data, and the model for overflow."
                )
        if self._loss_fn is None and step.classes is not None:
            logits = logits_of(output)
            if logits is not None and logits.ndim == 2:
                check_label_range(step.classes, logits)
        return output

    def _observe(self, node: str, value: Tensor, step: Step) -> None:
        views: dict[Site, Tensor] = {}  # signals that share a site share its view
        for observer in self._observers[node]:
            site = observer.site
            if site not in views:
                views[site] = by_entry(value, site, step.size, self._open_axes[node], observer.group)
            observer.tally.observe(observer.group, site, views[site], step)

    def _backward(self, output: Any, batch: Batch, step: Step) -> None:
        """Gradients of the batch's mean loss, for each signal that wants some."""
        loss: Any = output
        if self._loss_fn is None:
            with _said_of(f"signal {next(iter(self._wanted))}"):
                loss = default_loss(output, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise CalibrationError(
                f"loss: expected one number, the batch's mean loss, got {got}. Do average it."
            )
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(
                f"loss: expected a finite number, got {loss.item()}. "
                "Do check the data, and the model for overflow."
            )
        # Tied parameters share an alias, which autograd wants to see once.
        aliases = {id(self.model.tensors[n]): self.model.tensors[n] for n in self._differentiable}
        if not aliases:
            return
        if not loss.requires_grad:
            raise CalibrationError(
                "loss: expected one that depends on the model's parameters, got a constant. Do compute it "
                "from the model's output, without detach or no_grad."
            )
        # materialize_grads: zeros for parameters that do not reach the loss.
        found = torch.autograd.grad(
            loss.reshape(()), list(aliases.values()), allow_unused=True, materialize_grads=True
        )
        by_alias = dict(zip(aliases, found, strict=True))
        gradients = {name: by_alias[id(self.model.tensors[name])] for name in self._differentiable}
        for signal, names in self._wanted.items():
            self._tallies[signal].gradients({n: g for n, g in gradients.items() if n in names}, step)


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Put what was being done before the message of a CalibrationError."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error


def _check_weights(graph: Graph, model: CapturedModel) -> None:
    touched = {piece.tensor for group in graph.groups for piece in group.slices}
    for name, tensor in model.tensors.items():
        if name not in model.parameters and name not in touched:
            continue  # a buffer such as an attention mask may hold infinities on purpose
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ScoreError(
                f"score: expected finite weights, got NaN or infinity in {name}. "
                "Do repair or reload the model."
            )
