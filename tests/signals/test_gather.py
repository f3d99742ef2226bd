from __future__ import annotations

import gc
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.errors import CalibrationError, ScoreError
from secateur.graph.groups import Group, Site
from secateur.graph.trace import trace
from secateur.signals import Context, Magnitude, Signal, Step, Tally, Taylor, Wasserstein, score
from tests.helpers.models import CLASSES, TOPOLOGIES, build
from tests.signals.data import labelled

ALL = ("wasserstein", "taylor", "magnitude")


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Returns a function that fails unless the model, and the random state, are as they are now."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    copies = [(name, t, t.detach().clone(), t._version, t.requires_grad, t.grad) for name, t in tensors]
    grads = [None if t.grad is None else t.grad.clone() for _, t in tensors]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def modules() -> list[tuple[bool, list[int]]]:
        return [(m.training, [len(getattr(m, hook)) for hook in hooks]) for m in model.modules()]

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002

    flags, drawn, enabled = modules(), states(), torch.is_grad_enabled()

    def check() -> None:
        now = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for (name, t), (old_name, old, value, version, needs, grad), copy in zip(
            now, copies, grads, strict=True
        ):
            assert name == old_name
            assert t is old, name
            assert torch.equal(t, value), name
            assert t._version == version, name
            assert t.requires_grad == needs, name
            assert t.grad is grad, name
            assert copy is None or torch.equal(t.grad, copy), name
        assert modules() == flags
        assert states() == drawn
        assert torch.is_grad_enabled() == enabled

    return check


def test_the_snapshot_sees_changes() -> None:
    model = build("plain")
    for change in (
        lambda: model[0][1].running_mean.add_(0),  # in place, even without effect
        lambda: model[0].train(),
        lambda: model[0].register_forward_hook(print),
        lambda: model[0][0].weight.requires_grad_(False),
        lambda: torch.rand(1),
        lambda: random.random(),
    ):
        check = snapshot(model)
        check()
        change()
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["residual", "tied_linear", "mlp"])
def test_the_model_is_left_bitwise_as_it_was(name: str, training: bool) -> None:
    model, data = build(name).train(training), labelled(name)
    first = next(p for p in model.parameters())
    first.grad = torch.ones_like(first)
    list(model.parameters())[-1].requires_grad_(False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    graph = trace(model, data[0][0])
    calls.clear()
    check = snapshot(model)
    score(graph, data, ALL)
    check()
    assert not calls


class Failing(Signal):
    """Fails in the second batch, at the point it is told to."""

    name = "failing"
    needs = frozenset({"activations", "labels", "gradients"})

    def __init__(self, where: str) -> None:
        self.where = where

    def start(self, context: Context) -> Tally:
        where = self.where

        class _Tally(Tally):
            def fail(self, here: str, step: Step) -> None:
                torch.rand(3)
                if here == where and step.index == 1:
                    raise KeyboardInterrupt(here)

            def begin(self, step: Step) -> None:
                self.fail("begin", step)

            def observe(self, group: Group, site: Site, value: Tensor, step: Step) -> None:
                self.fail("observe", step)

            def gradients(self, gradients: Any, step: Step) -> None:
                self.fail("gradients", step)

            def finish(self) -> dict[str, np.ndarray]:
                if where == "finish":
                    raise KeyboardInterrupt(where)
                return {group.name: np.zeros(group.size) for group in context.graph.groups}

        return _Tally()


@pytest.mark.parametrize("where", ["begin", "observe", "gradients", "finish"])
def test_the_model_is_left_as_it_was_when_something_fails(where: str) -> None:
    model, data = build("residual"), labelled("residual")
    graph = trace(model, data[0][0])
    check = snapshot(model)
    with pytest.raises(KeyboardInterrupt, match=where):
        score(graph, data, (*ALL, Failing(where)))
    check()
    score(graph, data, ALL)  # and the graph still works
    check()


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology(name: str) -> None:
    model, inputs = build(name), TOPOLOGIES[name].inputs
    graph = trace(model, inputs(4, torch.float64))
    data = [(inputs(n, torch.float64, seed), torch.arange(n) % 2) for seed, n in enumerate((4, 6, 3))]

    def loss_fn(run: Callable[..., Any], batch: Any) -> Tensor:
        output = run(*batch[0])
        output = output["logits"] if isinstance(output, dict) else output
        return output.square().mean()

    check = snapshot(model)
    scores = score(graph, data, ALL, loss_fn=loss_fn)
    check()
    scores.check(graph)
    assert (scores.samples, scores.classes, scores.fingerprint) == (13, 2, graph.fingerprint)
    for signal in ALL:
        assert all((v >= 0).all() for v in scores[signal].values())
        assert any(v.max() > 0 for v in scores[signal].values())
    again = score(graph, data, ALL, loss_fn=loss_fn)
    assert all(np.array_equal(scores[s][g], again[s][g]) for s in ALL for g in scores[s])


def test_signals_do_not_influence_each_other() -> None:
    model, data = build("residual"), labelled("residual")
    graph = trace(model, data[0][0])
    together = score(graph, data, ALL)
    for signal in ALL:
        alone = score(graph, data, signal)
        for group in graph.groups:
            np.testing.assert_allclose(alone[signal][group.name], together[signal][group.name], rtol=1e-12)


def test_one_forward_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    runs, plain = [], torch.fx.Interpreter.run
    monkeypatch.setattr(torch.fx.Interpreter, "run", lambda *a, **k: runs.append(1) or plain(*a, **k))
    score(graph, data, ALL)
    assert len(runs) == len(data)


class MeanActivation(Signal):
    """A user's own: the mean of what a unit shows."""

    name = "mean"
    needs = frozenset({"activations"})

    def start(self, context: Context) -> Tally:
        groups = context.graph.groups

        class _Tally(Tally):
            sums = {group.name: np.zeros(group.size) for group in groups}  # noqa: RUF012

            def observe(self, group: Group, site: Site, value: Tensor, step: Step) -> None:
                if site.stage == "produced":
                    np.add.at(self.sums[group.name], site.unit, value.mean(2).sum(0).numpy())

            def finish(self) -> dict[str, np.ndarray]:
                return self.sums

        return _Tally()


def test_a_signal_of_ones_own_needs_no_labels() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(5, 3), torch.randn(2, 3)]
    scores = score(trace(net, batches[0]), batches, MeanActivation())
    expected = sum(net[0](x).sum(0) for x in batches).detach().numpy()
    np.testing.assert_allclose(scores["mean"]["0"], expected, rtol=1e-5)
    assert (scores.samples, scores.classes) == (7, 0)


class WrongSize(MeanActivation):
    """Forgets a unit."""

    name = "wrong"

    def start(self, context: Context) -> Tally:
        tally = super().start(context)
        tally.finish = lambda: {group.name: np.zeros(group.size - 1) for group in context.graph.groups}
        return tally


def test_scores_of_the_wrong_size_are_refused() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    with pytest.raises(ScoreError, match="signal wrong, group 0: expected 4 scores, got 3"):
        score(trace(net, x), [x], WrongSize())


@pytest.mark.parametrize("signal", ["wasserstein", "taylor"])
def test_no_data_for_a_signal_that_needs_some(signal: str) -> None:
    graph = trace(build("mlp"), torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(CalibrationError, match=f"signal {signal}: expected calibration data .* got None"):
        score(graph, None, ("magnitude", signal))
    scores = score(graph, None, "magnitude")
    assert scores.samples == 0


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ("wasserstien", "expected one of wasserstein, taylor, magnitude, .*got 'wasserstien'"),
        ((), "expected at least one of"),
        ((Magnitude(1), "magnitude"), "got 'magnitude' twice"),
        ((Taylor,), "Pass an instance, not a class"),
        ((Wasserstein(), 3), "instances of Signal, got 3"),
    ],
)
def test_signals_that_are_none(signals: Any, message: str) -> None:
    graph = trace(build("mlp"), torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(ScoreError, match=message):
        score(graph, [], signals)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["outer1.weight", "norm1.running_var", "head.2.bias"])
def test_weights_that_are_not_finite_are_named(tensor: str, value: float) -> None:
    model, data = build("residual"), labelled("residual")
    graph = trace(model, data[0][0])
    model.state_dict()[tensor].view(-1)[1] = value
    for signal in ALL:
        with pytest.raises(ScoreError, match=f"got NaN or infinity in {tensor}"):
            score(graph, data, signal)


def test_outputs_that_are_not_numbers_name_the_batch() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x).relu()) + x.sum(1, keepdim=True).sqrt()

    graph = trace(Root(), torch.ones(2, 3))
    data = [torch.ones(2, 3), -torch.ones(2, 3)]
    with pytest.raises(CalibrationError, match="score, batch 1: model: expected finite outputs, got NaN"):
        score(graph, data, MeanActivation())


def test_empty_loader_and_nan_in_the_data() -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    with pytest.raises(CalibrationError, match="expected at least one batch, got an empty loader"):
        score(graph, [])
    data[1][0][2, 3] = float("nan")
    with pytest.raises(CalibrationError, match="calibration batch 1: expected finite inputs"):
        score(graph, data)


def test_wrong_input_shape_names_the_batch() -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    data[2] = (data[2][0][:, :4], data[2][1])
    with pytest.raises(
        CalibrationError, match=r"batch 2: model input .*: expected shape \[any, 6\], got \[4, 4\]"
    ):
        score(graph, data)


def test_a_loss_that_leaves_the_model_aside() -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    weight = torch.ones((), requires_grad=True)
    with pytest.raises(CalibrationError, match="loss_fn: expected it to call the model"):
        score(graph, data, loss_fn=lambda run, batch: weight * 2)


def test_a_loss_that_calls_the_model_twice_is_observed_once() -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    ce = nn.functional.cross_entropy
    twice = score(
        graph, data, loss_fn=lambda m, b: (ce(m(b[0]), b[1]) + ce(m(b[0]), b[1]) + 0 * m(9 * b[0]).sum()) / 2
    )
    once = score(graph, data)
    for group in graph.groups:
        np.testing.assert_array_equal(twice["wasserstein"][group.name], once["wasserstein"][group.name])
        np.testing.assert_allclose(twice["taylor"][group.name], once["taylor"][group.name], rtol=1e-10)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(context: Callable[[], Any]) -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    usual = score(graph, data, "taylor")["taylor"]
    with context():
        found = score(graph, data, "taylor")["taylor"]
    assert all(np.array_equal(found[g], usual[g]) for g in usual)


def test_mapping_batches_use_the_models_own_loss() -> None:
    class OwnLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, x, labels=None):
            logits = self.b(self.a(x).relu())
            if labels is None:
                return {"logits": logits}
            return {"loss": 3 * nn.functional.cross_entropy(logits, labels), "logits": logits}

    model, data = OwnLoss().double(), labelled("mlp")
    mappings = [{"x": x, "labels": y} for x, y in data]
    with_loss = score(trace(model, mappings[0]), mappings)
    plain = score(trace(model, {"x": data[0][0]}), mappings)
    singular = score(trace(model, {"x": data[0][0]}), [{"x": x, "label": y} for x, y in data])
    for group, r in singular["taylor"].items():
        np.testing.assert_allclose(with_loss["taylor"][group], 3 * r, rtol=1e-9)
        np.testing.assert_allclose(plain["taylor"][group], 3 * r, rtol=1e-9)
        np.testing.assert_allclose(with_loss["wasserstein"][group], plain["wasserstein"][group], rtol=1e-12)


def test_half_precision_is_scored() -> None:
    data = labelled("mlp")
    exact = score(trace(build("mlp"), data[0][0]), data, ALL)
    data = [(x.bfloat16(), y) for x, y in data]
    rough = score(trace(build("mlp", torch.bfloat16), data[0][0]), data, ALL)
    for signal in ("wasserstein", "magnitude"):
        for group, scores in exact[signal].items():
            np.testing.assert_allclose(rough[signal][group], scores, rtol=0.1, atol=0.02)


class Slopes(Signal):
    """Keeps the activations and gradients that it is shown, by group and node."""

    name = "slopes"
    needs = frozenset({"activation_gradients"})

    def __init__(self) -> None:
        self.seen: dict[tuple[str, Site], list[tuple[Tensor, Tensor]]] = {}

    def start(self, context: Context) -> Tally:
        seen = self.seen

        class _Tally(Tally):
            def activation_gradients(
                self, group: Group, site: Site, value: Tensor, gradient: Tensor, step: Step
            ) -> None:
                assert value.shape == gradient.shape
                assert value.shape[:2] == (step.size, len(site.position))
                assert not value.requires_grad
                seen.setdefault((group.name, site), []).append((value.clone(), gradient.clone()))

            def finish(self) -> dict[str, np.ndarray]:
                return {group.name: np.zeros(group.size) for group in context.graph.groups}

        return _Tally()


def literal_slopes(model: nn.Module, name: str, data: Any) -> list[tuple[Tensor, Tensor]]:
    """Output of a layer and the loss's gradient with respect to it, by a zero that is added to the output."""
    model = deepcopy(model).eval()
    found = []
    for x, y in data:
        probes = []

        def add(_m: nn.Module, _x: Any, out: Tensor, probes: list[Any] = probes) -> Tensor:
            probes.append((out.detach().clone(), torch.zeros_like(out, requires_grad=True)))
            return out + probes[-1][1]

        handle = model.get_submodule(name).register_forward_hook(add)
        loss = nn.functional.cross_entropy(model(x), y)
        handle.remove()
        ((value, probe),) = probes
        found.append((value, torch.autograd.grad(loss, probe)[0]))
    return found


class InPlace(nn.Sequential):
    """Activations written over what the layers computed, one of them through a view."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 5, 3, bias=False),
            nn.Flatten(2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(5, CLASSES),
        )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["residual", "plain", "mlp", "gated", "in place"])
def test_gradients_of_activations_are_those_of_the_loss(name: str, frozen: bool) -> None:
    torch.manual_seed(0)
    model = InPlace().double().eval() if name == "in place" else build(name)
    model.requires_grad_(not frozen)
    data = labelled("plain" if name == "in place" else name)
    signal, graph = Slopes(), trace(model, data[0][0])
    check = snapshot(model)
    score(graph, data, signal)
    check()
    produced = [(key, pairs) for key, pairs in signal.seen.items() if key[1].stage == "produced"]
    assert {group for (group, _), _ in produced} == {group.name for group in graph.groups}
    for (_, site), pairs in produced:
        layer = site.producer.rpartition(".")[0]
        axis = -1 if isinstance(model.get_submodule(layer), nn.Linear) else 1
        for got, expected in zip(pairs, literal_slopes(model, layer, data), strict=True):
            for mine, literal in zip(got, expected, strict=True):
                literal = literal.movedim(axis, 1).flatten(2) if literal.ndim > 2 else literal[..., None]
                literal = literal[:, torch.as_tensor(site.position)]
                torch.testing.assert_close(mine, literal, rtol=1e-10, atol=1e-14)
        assert max(slope.abs().max() for _, slope in pairs) > 1e-5


def test_gradients_behind_an_activation_function() -> None:
    model, data = InPlace().double().eval(), labelled("plain")
    signal = Slopes()
    score(trace(model, data[0][0]), data, (signal, "taylor", "wasserstein"))
    before, after = (
        next(pairs for (group, site), pairs in signal.seen.items() if (group, site.stage) == ("0", stage))
        for stage in ("produced", "activated")
    )
    for (value, slope), (activated, behind) in zip(before, after, strict=True):
        torch.testing.assert_close(activated, value.relu())
        torch.testing.assert_close(slope, behind * (value > 0))
        assert not torch.equal(slope, behind)


def test_activations_that_do_not_reach_the_loss_have_no_gradient() -> None:
    signal, data = Slopes(), labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    score(graph, data, signal, loss_fn=lambda run, batch: run(batch[0]).mean() * 0)
    assert signal.seen
    assert not any(slope.any() for pairs in signal.seen.values() for _, slope in pairs)
    with pytest.raises(CalibrationError, match="got a constant"):
        score(graph, data, signal, loss_fn=lambda run, batch: run(batch[0]).mean().detach())


def test_activations_are_let_go_after_each_batch() -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    alive: list[int] = []

    class Counting(Slopes):
        def start(self, context: Context) -> Tally:
            tally = super().start(context)
            tally.begin = lambda step: alive.append(sum(type(o) is Tensor for o in gc.get_objects()))
            tally.activation_gradients = lambda *seen: None
            return tally

    gc.collect()  # what other tests left is not counted, and does not go while we count
    gc.disable()
    try:
        score(graph, data, Counting())
    finally:
        gc.enable()
    assert alive == alive[:1] * len(data)


class Noisy(nn.Sequential):
    """Adds noise that the program draws, in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return self[2]((self[0](x) + torch.randn(x.shape[0], 4, dtype=x.dtype)).relu())


def test_what_a_program_draws_depends_on_the_batch_alone() -> None:
    model = Noisy(nn.Linear(6, 4), nn.Identity(), nn.Linear(4, CLASSES)).double()
    data = labelled("mlp")
    graph = trace(model, data[0][0])
    first, again = (score(graph, data, "taylor")["taylor"]["0"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, score(graph, data, "taylor", seed=1)["taylor"]["0"])
    slopes = Slopes()
    score(graph, [data[0], data[0]], slopes)
    for (one, _), (other, _) in slopes.seen.values():
        torch.testing.assert_close(one, other)  # in front of the noise
    gradients = [[slope for _, slope in pairs] for pairs in slopes.seen.values()]
    assert any(not torch.equal(one, other) for one, other in gradients)
