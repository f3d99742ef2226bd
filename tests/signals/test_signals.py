"""What holds for every signal of the registry."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.calibration import Batch
from secateur.errors import ScoreError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.signals import BatchNormScale, Magnitude, Product, Taylor, Wasserstein, score
from secateur.signals.onepass import OnePass
from secateur.signals.registry import SIGNALS, resolve
from tests.helpers.models import TOPOLOGIES, build
from tests.signals.data import labelled

Data = list[tuple[Tensor, Tensor]]
SEED = 5


VARIED = (
    "concat", "grouped", "squeeze_excite", "channel_shuffle", "pixel_shuffle", "gru_bidirectional",
    "lstm_last_state", "multi_input", "tied_linear", "functional", "stack_unbind_roll", "channels_last",
)  # fmt: skip
"""Topologies that differ in how units lie in weights and activations."""


@cache
def residual() -> tuple[Graph, Data]:
    data = labelled("residual", (7, 9, 4, 6))
    return trace(build("residual"), data[0][0]), data


def one_pass(graph: Graph, names: tuple[str, ...]) -> OnePass:
    signals = resolve(names)
    return OnePass(graph, signals, {s.name: graph.groups for s in signals}, None, seed=SEED)


@pytest.mark.parametrize("name", SIGNALS)
def test_the_key_is_the_class_own_name_and_the_docstring_says_the_direction(name: str) -> None:
    assert SIGNALS[name].name == name
    assert any("Direction:" in (c.__doc__ or "") for c in SIGNALS[name].__mro__)
    assert SIGNALS[name]() == SIGNALS[name]()


@pytest.mark.parametrize("name", VARIED)
def test_every_signal_scores_every_kind_of_unit(name: str) -> None:
    inputs = TOPOLOGIES[name].inputs
    graph = trace(build(name), inputs(4, torch.float64))
    data = [(inputs(n, torch.float64, seed), torch.arange(n) % 2) for seed, n in enumerate((4, 3))]

    def loss_fn(run, batch) -> Tensor:
        return run(*batch[0]).square().mean()

    names = [n for n in SIGNALS if n not in ("batchnorm_scale", "wasserstein", "magnitude")]
    scores = score(graph, data, (*names, "activation*l1+taylor_sample"), loss_fn=loss_fn)
    scores.check(graph)
    for signal in scores.signals:
        assert all((v >= 0).all() for v in scores[signal].values())
        assert any(v.max() > 0 for v in scores[signal].values()), signal


def test_scored_together_as_alone_and_however_batches_are_cut() -> None:
    graph, data = residual()
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    together = score(graph, data, tuple(SIGNALS), seed=SEED)
    cut = score(graph, list(zip(x.split(5), y.split(5), strict=True)), tuple(SIGNALS), seed=SEED)
    for name in SIGNALS:
        alone = score(graph, data, name, seed=SEED)
        for group in together[name]:
            np.testing.assert_array_equal(alone[name][group], together[name][group])
            np.testing.assert_allclose(cut[name][group], together[name][group], rtol=1e-9, atol=1e-15)


def test_shares_of_the_data_merge_into_what_one_run_gives() -> None:
    graph, data = residual()
    batches = [Batch.of(raw, index) for index, raw in enumerate(data)]
    whole = one_pass(graph, tuple(SIGNALS))
    for batch in batches:
        whole.run(batch)
    shares = []
    for rank in range(3):  # the last of the three reads a single batch, a fourth none
        share = one_pass(graph, tuple(SIGNALS))
        for batch in batches[rank::3]:
            share.run(batch)
        shares.append(share.states())
    shares.append(one_pass(graph, tuple(SIGNALS)).states())
    merged = one_pass(graph, tuple(SIGNALS))
    merged.merge({name: [share[name] for share in shares] for name in SIGNALS})
    expected, found = whole.finish(), merged.finish()
    for name in SIGNALS:
        for group in graph.groups:
            np.testing.assert_allclose(found[name][group.name], expected[name][group.name], rtol=1e-12)


def test_a_run_taken_up_again_ends_bit_for_bit_the_same() -> None:
    graph, data = residual()
    batches = [Batch.of(raw, index) for index, raw in enumerate(data)]
    whole, first, second = (one_pass(graph, tuple(SIGNALS)) for _ in range(3))
    for batch in batches:
        whole.run(batch)
    for batch in batches[:2]:
        first.run(batch)
    stored = {name: {k: v.clone() for k, v in s.items()} for name, s in first.states().items()}
    second.merge({name: [state] for name, state in stored.items()})
    for batch in batches[2:]:
        second.run(batch)
    expected, found = whole.finish(), second.finish()
    for name in SIGNALS:
        for group in graph.groups:
            np.testing.assert_array_equal(found[name][group.name], expected[name][group.name])


def test_data_is_needed_where_it_is_read_and_only_there() -> None:
    graph, _ = residual()
    for name, kind in SIGNALS.items():
        if kind.needs == {"weights"}:
            assert score(graph, None, name).samples == 0
        else:
            with pytest.raises(Exception, match=f"signal {name}: expected calibration data"):
                score(graph, None, name)


def test_frozen_parameters_and_untouched_gradients() -> None:
    model, data = build("residual"), labelled("residual")
    trainable = score(trace(model, data[0][0]), data, tuple(SIGNALS))
    model.requires_grad_(False)
    frozen = score(trace(model, data[0][0]), data, tuple(SIGNALS))
    for name in SIGNALS:
        for group, vector in trainable[name].items():
            np.testing.assert_array_equal(frozen[name][group], vector)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_loss_of_ones_own_reaches_every_gradient_signal() -> None:
    graph, data = residual()
    names = tuple(n for n, kind in SIGNALS.items() if kind.needs & {"gradients", "activation_gradients"})
    assert set(names) == {"taylor", "taylor_sample", "fisher", "snip"}
    usual = score(graph, data, names)
    double = score(graph, data, names, loss_fn=lambda run, b: 2 * F.cross_entropy(run(b[0]), b[1]))
    for name in names:
        factor = 4 if name == "fisher" else 2
        for group, vector in usual[name].items():
            np.testing.assert_allclose(double[name][group], factor * vector, rtol=1e-9)


@pytest.mark.parametrize(
    ("signals", "found"),
    [
        ("taylor", (Taylor(),)),
        (["taylor", "taylor"], (Taylor(),)),
        ("l1*taylor", (SIGNALS["l1"](), Taylor())),
        (["taylor", "l1*taylor+l1"], (Taylor(), SIGNALS["l1"]())),
        (Product("taylor", Magnitude(p=1)), (Taylor(), Magnitude(p=1))),
    ],
)
def test_resolve(signals, found) -> None:
    assert resolve(signals) == found


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ("wasserstien", r"expected one of wasserstein, taylor, .*, got 'wasserstien'"),
        ("l1*tailor", "expected one of .* got 'tailor'"),
        ("l1*", "expected one of .* got ''"),
        ("l1 * taylor", "expected one of .* got 'l1 '"),
        ((), "expected at least one of"),
        ((Magnitude(1), "magnitude"), "expected each name with one setting, got 'magnitude' twice"),
        (("magnitude*taylor", BatchNormScale(), Magnitude(1)), "got 'magnitude' twice"),
        ((Taylor,), "Pass an instance, not a class"),
        ((Wasserstein(), 3), "instances of Signal, got 3"),
    ],
)
def test_what_is_no_signal(signals, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        resolve(signals)
