"""Batches of several sizes give the scores that they give one by one, each traced at its own size."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration import Calibration
from secateur.graph.trace import trace
from secateur.signals import score
from secateur.signals.onepass import OnePass
from secateur.signals.program import NotObservedError
from secateur.signals.registry import SIGNALS, resolve
from tests.helpers.lengths import SIZES, batches, network

ADDED = [name for name in SIGNALS if name not in ("wasserstein", "batchnorm_scale")]
"""Those whose sums do not depend on the size at which the model was traced."""


@functools.cache
def traces(name: str) -> list[sc.Graph]:
    """A trace of a network at the size of each batch."""
    model = network(name)
    return [trace(model, batch.inputs) for batch in Calibration.of(batches(name), model=model)]


def one_by_one(name: str, signal_name: str, count: int | None = None) -> dict[str, Any]:
    """The scores of a signal, from a trace for each batch: what processes with a batch each would merge."""
    (signal,) = resolve(signal_name)
    passes = []
    for graph, batch in zip(traces(name), Calibration.of(batches(name), model=network(name)), strict=True):
        one = OnePass(graph, [signal], {signal_name: graph.groups}, None, seed=0)
        if signal.needs - {"weights"}:
            one.run(batch)
        passes.append(one)
    passes = passes[:count]
    passes[0].merge({signal_name: [one.states()[signal_name] for one in passes]})
    found: dict[str, Any] = passes[0].finish()[signal_name]
    return found


@pytest.mark.parametrize("name", [name for name in SIZES if name != "steps"])
def test_scores_are_those_of_the_batches_one_by_one(name: str) -> None:
    signals = [s for s in ADDED if name != "language" or "labels" not in resolve(s)[0].needs]
    scores = score(traces(name)[0], batches(name), signals, progress=False)
    for signal in signals:
        for group, expected in one_by_one(name, signal).items():
            np.testing.assert_allclose(scores[signal][group], expected, rtol=1e-9, atol=1e-12, err_msg=signal)


def test_the_comparison_can_tell_a_difference() -> None:
    whole, part = (one_by_one("windows", "activation", count) for count in (None, 3))
    assert not np.allclose(whole["a"], part["a"], rtol=1e-9)


def test_few_programs_serve_many_sizes_and_a_guard_of_the_forward_pass_is_heard() -> None:
    for name, most in (("tokens", 2), ("windows", 4)):  # padded or not, up to eight positions or more
        graph = trace(network(name), batches(name)[0][0])
        score(graph, batches(name), "activation", progress=False)
        assert 2 <= len(graph.programs) <= most


def test_what_a_loop_repeats_cannot_be_observed_at_other_lengths() -> None:
    graph = traces("steps")[0]
    with pytest.raises(NotObservedError, match=r"calls cell .* as often as at the traced ones") as refused:
        score(graph, batches("steps"), "activation", progress=False)
    assert len(str(refused.value)) <= 600
    found = score(graph, batches("steps"), "taylor", progress=False)["taylor"]
    for group, expected in one_by_one("steps", "taylor").items():
        np.testing.assert_allclose(found[group], expected, rtol=1e-9, atol=1e-12)


def test_a_size_that_the_model_does_not_take_is_refused_in_words() -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    graph = trace(net, torch.randn(2, 2, 3))
    with pytest.raises(
        sc.CalibrationError, match=r"expected shape \[any, 2, 3\], got \[2, 2, 5\], which the model"
    ):
        score(graph, [torch.randn(2, 2, 5)], "activation", progress=False)
