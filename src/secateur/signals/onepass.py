"""One pass over the calibration data: each batch once forward, once backward if need be, for every signal.

The captured program runs on aliases of the model's tensors (see `secateur.signals.program`), so nothing of
the model can change, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from secateur.calibration import Batch
from secateur.common.outputs import tensors_of
from secateur.errors import CalibrationError, ScoreError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site
from secateur.graph.nodes import shape_of
from secateur.signals.by_unit import by_entry
from secateur.signals.checkpoint import Values
from secateur.signals.loss import (
    LossFn,
    check_label_range,
    check_reached,
    default_loss,
    logits_of,
    one_number,
    own_loss,
)
from secateur.signals.memory import Covers
from secateur.signals.program import CapturedModel, NotObservedError, Read
from secateur.signals.signal import Context, Signal, Step, SumTally, Tally


@dataclass(frozen=True, eq=False)
class _Observer:
    """A tally that observes a node, and the site it observes."""

    signal: Signal
    tally: Tally
    group: Group
    site: Site


class OnePass:
    """Runs batches, and passes to each signal's tally what it needs."""

    def __init__(
        self,
        graph: Graph,
        signals: Sequence[Signal],
        covers: Covers,
        loss_fn: LossFn | None,
        *,
        seed: int,
        memory: int | None = None,
        views: int = 1,
        model: CapturedModel | None = None,
    ) -> None:
        """Prepare a pass.

        Args:
            graph: From `sc.trace`.
            signals: All signals of the run. Labels are read if one of them needs them.
            covers: The groups that each signal scores in this pass. A signal without groups is left out.
            loss_fn: As for `gather`.
            seed: For the tallies' context.
            memory: For the tallies' context.
            views: For the tallies' context.
            model: The captured model of an earlier pass over the same graph, whose weights are known to be
                finite. Only for signals that need no gradients.

        Raises:
            ScoreError: A weight is not finite.
        """
        self._labels_for = next((s.name for s in signals if "labels" in s.needs), None)
        self._loss_fn = loss_fn
        self._is_whole = graph.groups in covers.values()
        active = [signal for signal in signals if signal.name in covers]
        self._wanted = {
            signal.name: {name for group in covers[signal.name] for name in signal.tensors(group)}
            for signal in active
            if "gradients" in signal.needs
        }
        watched = [
            (signal, group, site)
            for signal in active
            if signal.needs & {"activations", "activation_gradients"}
            for group in covers[signal.name]
            for site in signal.sites(group)
        ]
        by_gradient = {site for signal, _, site in watched if "activation_gradients" in signal.needs}
        self._parameters = _differentiable(graph, set().union(*self._wanted.values()))
        # An activation is part of autograd's graph if the weight that produces it is.
        producers = {
            site.producer
            for site in by_gradient
            if site.producer in graph.program.state_dict
            and graph.program.state_dict[site.producer].is_floating_point()
        }
        self.model = model or CapturedModel(graph.programs, producers.union(self._parameters))
        if model is None:
            _check_weights(graph, self.model)
        self._signals = {signal.name: signal for signal in active}
        self._tallies = {
            signal.name: signal.start(self._context(graph, covers[signal.name], seed, memory, views))
            for signal in active
        }
        self._observers: dict[str, list[_Observer]] = {}
        for signal, group, site in watched:
            observer = _Observer(signal, self._tallies[signal.name], group, site)
            self._observers.setdefault(site.node, []).append(observer)
        self._callers: dict[str, list[Tally]] = {}
        for signal in active:
            tally = self._tallies[signal.name]
            for node in tally.calls() if "calls" in signal.needs else ():
                self._callers.setdefault(node, []).append(tally)
        self._by_gradient = frozenset(site.node for site in by_gradient)
        self._lengths = {n.name: shape_of(n) for n in graph.program.graph.nodes if n.name in self._observers}
        self._kept: dict[str, tuple[Tensor, GradientEdge]] = {}  # of the batch in progress

    def _context(
        self, graph: Graph, groups: tuple[Group, ...], seed: int, memory: int | None, views: int
    ) -> Context:
        part = graph if groups == graph.groups else graph.restricted_to(groups)
        return Context(part, self.model.tensors, self.model.parameters, seed, memory, views)

    @property
    def _differentiates(self) -> bool:
        return bool(self._wanted or self._by_gradient)

    def finish(self) -> Values:
        """Return the scores of every signal."""
        return {name: dict(tally.finish()) for name, tally in self._tallies.items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of each signal's tally."""
        return {name: tally.state() for name, tally in self._tallies.items()}

    def merge(self, states: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> None:
        """Replace the state of each tally by the union of such states."""
        for name, tally in self._tallies.items():
            tally.merge(states[name])

    def check_states(self) -> None:
        """Raise ScoreError if a signal reads data, but its tally has no `state`."""
        for name, tally in self._tallies.items():
            if self._signals[name].needs - {"weights"} and type(tally).state is Tally.state:
                raise ScoreError(
                    f"signal {name}: expected a tally with state and merge, which a checkpoint and several "
                    f"processes need, got {type(tally).__name__} without. Implement them, or derive the "
                    "tally from SumTally."
                )

    def step(self, batch: Batch) -> Step:
        """Describe a batch for the tallies. It includes labels if a signal needs them."""
        classes = None
        if self._labels_for is not None:
            with errors_prefixed(f"signal {self._labels_for}"):
                classes = batch.classes()
        return Step(batch.index, batch.size, classes, padding=batch.padding)

    def begin(self, step: Step) -> None:
        """Tell all tallies that a batch starts."""
        for tally in self._tallies.values():
            tally.begin(step)

    @property
    def can_interleave(self) -> bool:
        """Whether batches may be in progress together: no gradients, and no tally has its own `begin`."""
        begins = {type(tally).begin for tally in self._tallies.values()}
        return not self._differentiates and begins <= {Tally.begin, SumTally.begin}

    @property
    def watched(self) -> Collection[str]:
        """The names of the nodes to `show`."""
        return self._observers.keys() | self._callers.keys()

    def show(self, node: str, value: Tensor, read: Read, step: Step) -> None:
        """Show the value of a node to the tallies that watch it.

        Args:
            node: The node's name.
            value: The node's value.
            read: Returns the value of a node that this one reads.
            step: The batch.
        """
        if node in self._observers:
            self._observe(node, value, step)
        for tally in self._callers.get(node, ()):
            tally.call(node, value.detach(), read, step)

    def run(self, batch: Batch) -> Step:
        """Run one batch: forward, and backward if a signal needs gradients."""
        step = self.step(batch)
        self.begin(step)
        try:
            with torch.set_grad_enabled(self._differentiates), errors_prefixed(f"score, batch {batch.index}"):
                output = self._forward(batch, step)
                if self._differentiates:
                    self._backward(output, batch, step)
        finally:
            self._kept.clear()
        return step

    def _forward(self, batch: Batch, step: Step) -> Any:
        """Run the model on a batch. Return its output; if `loss_fn` calls the model, the loss."""
        seen: set[str] = set()

        def watcher(node: str, value: Tensor, read: Read) -> None:
            if node not in seen:  # a loss_fn may call the model again: only its first call counts
                seen.add(node)
                self.show(node, value, read, step)

        watched = self.watched
        self.model.watch(watched, watcher)
        try:
            if self._loss_fn is not None and self._differentiates:
                output = own_loss(self._loss_fn, self.model, batch.raw)
            else:
                output = batch.run(self.model, labelled=self._differentiates)
        finally:
            self.model.watch((), None)
        if len(seen) < len(watched):
            raise CalibrationError(
                "loss_fn: expected it to call the model that it is given, got a loss without a call. "
                "Compute the loss as loss_fn(model, batch) from model(...)."
            )
        for value in tensors_of(output):
            if value.is_floating_point() and bool(value.isnan().any()):
                raise CalibrationError(
                    "model: expected finite outputs, got NaN. Check the data, and the model for overflow."
                )
        if self._loss_fn is None and step.classes is not None:
            logits = logits_of(output)
            if logits is not None and logits.ndim == 2:
                check_label_range(step.classes, logits)
        return output

    def _observe(self, node: str, value: Tensor, step: Step) -> None:
        plain = value.detach()
        view = self._viewer(node, plain, step)
        for observer in self._observers[node]:
            if "activations" in observer.signal.needs:
                seen = view(observer)
                observer.tally.observe(
                    observer.group, observer.site, seen.flatten(2), replace(step, map=tuple(seen.shape[2:]))
                )
        if node not in self._by_gradient or not torch.is_grad_enabled():
            return
        if value.is_floating_point() and not self.model.writes:
            value.requires_grad_()  # it has no gradient yet if a constant computes it from the inputs
        if not value.requires_grad:
            observer = self._observers[node][0]
            raise ScoreError(
                f"group {observer.group.name}: expected an activation at {node} that has a gradient, got "
                f"one that {observer.site.producer} produces without. Exclude the group, or choose another "
                "signal."
            )
        # Keep the edge, not the value: the program may write into the value later, and change its gradient.
        self._kept[node] = (plain.clone() if self.model.writes else plain, get_gradient_edge(value))

    def _viewer(self, node: str, value: Tensor, step: Step) -> Callable[[_Observer], Tensor]:
        """Return a function from a node's value to an observer's view of it; equal sites share one view."""
        views: dict[Site, Tensor] = {}

        def view(observer: _Observer) -> Tensor:
            site, group = observer.site, observer.group
            if site not in views:
                if self.model.counts_data(node):
                    raise NotObservedError(
                        f"group {group.name}: expected an axis of samples at {node}, got one whose length "
                        "depends on the data, such as the tokens of an expert. Use a signal that reads no "
                        "activations, or exclude the group."
                    )
                expected = self._lengths[site.node][site.axis]
                if value.shape[site.axis] != expected:
                    raise NotObservedError(
                        f"group {group.name}: expected {expected} entries at {node}, as traced, got "
                        f"{value.shape[site.axis]}: the size of the inputs is part of that axis. Pad batches "
                        "to the traced size, or use a signal that reads no activations."
                    )
                found = by_entry(value, site, step.size, self.model.batch_axes(node), group)
                views[site] = found if found.ndim > 2 else found[:, :, None]
            return views[site]

        return view

    def _backward(self, output: Any, batch: Batch, step: Step) -> None:
        """Compute gradients of the batch's mean loss, and pass them to the signals that need them."""
        # Tied parameters share an alias. Autograd must get it only once.
        aliases = {id(self.model.tensors[n]): self.model.tensors[n] for n in self._parameters}
        if not aliases and not self._by_gradient:
            return
        loss = self._loss(output, batch)
        inputs: list[Any] = [*aliases.values(), *(edge for _, edge in self._kept.values())]
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        if self._is_whole and self._loss_fn is not None:
            check_reached(found)
        by_alias = dict(zip(aliases, found, strict=False))
        gradients = {}
        for name in self._parameters:
            tensor = self.model.tensors[name]
            gradient = by_alias[id(tensor)]
            # None for parameters that do not reach the loss.
            gradients[name] = torch.zeros_like(tensor) if gradient is None else gradient
        for signal, names in self._wanted.items():
            self._tallies[signal].gradients({n: g for n, g in gradients.items() if n in names}, step)
        for (node, (value, _)), gradient in zip(self._kept.items(), found[len(aliases) :], strict=True):
            self._show_gradient(node, value, gradient, step)

    def _show_gradient(self, node: str, value: Tensor, gradient: Tensor | None, step: Step) -> None:
        values = self._viewer(node, value, step)
        slopes = self._viewer(node, torch.zeros_like(value) if gradient is None else gradient, step)
        for observer in self._observers[node]:
            if "activation_gradients" in observer.signal.needs:
                value_, slope = values(observer), slopes(observer)
                here = replace(step, map=tuple(value_.shape[2:]))
                observer.tally.activation_gradients(
                    observer.group, observer.site, value_.flatten(2), slope.flatten(2), here
                )

    def _loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the batch's mean loss, checked."""
        loss: Any = output
        if self._loss_fn is None:
            reader = next(
                name for name, s in self._signals.items() if s.needs & {"gradients", "activation_gradients"}
            )
            with errors_prefixed(f"signal {reader}"):
                loss = default_loss(output, batch)
        return one_number(loss, differentiable=True)


@contextmanager
def errors_prefixed(where: str) -> Iterator[None]:
    """Put `where` before the message of a CalibrationError that is raised inside the block."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error


def _differentiable(graph: Graph, wanted: set[str]) -> tuple[str, ...]:
    """Return those names that belong to floating-point parameters, in the model's order."""
    parameters = frozenset(graph.program.graph_signature.parameters)
    return tuple(
        name
        for name, tensor in graph.program.state_dict.items()
        if name in parameters and name in wanted and tensor.is_floating_point()
    )


def _check_weights(graph: Graph, model: CapturedModel) -> None:
    touched = {piece.tensor for group in graph.groups for piece in group.slices}
    for name, tensor in model.tensors.items():
        if name not in model.parameters and name not in touched:
            continue  # a buffer such as an attention mask may hold infinities on purpose
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ScoreError(
                f"score: expected finite weights, got NaN or infinity in {name}. Repair or reload the model."
            )
