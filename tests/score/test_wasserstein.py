from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import nn

from secateur.errors import CalibrationError, ScoreError, SettingError
from secateur.graph.groups import Group, Site
from secateur.graph.trace import trace
from secateur.score import Wasserstein, score
from secateur.score import wasserstein as name_of_module
from secateur.score.wasserstein import largest_distance
from tests.models import build
from tests.score import reference
from tests.score.data import labelled


@pytest.mark.parametrize("name", ["residual", "plain", "gated", "mlp", "channels_last", "conv1d"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_formula(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, data = build(name, dtype), labelled(name, dtype=dtype)
    graph = trace(model, data[0][0])
    signal = Wasserstein(projections=5, per_class=3)
    scores = score(graph, data, signal, seed=3)["wasserstein"]
    for group in graph.groups:
        if name == "channels_last" and group.name == "stem":
            continue  # its producers lay their units along different axes; covered by "residual"
        expected = reference.wasserstein(model, group, data, projections=5, per_class=3, seed=3)
        scale = max(1.0, expected.max())
        np.testing.assert_allclose(scores[group.name], expected, rtol=tolerance, atol=tolerance * scale)


def test_the_reference_can_tell_a_difference() -> None:
    model, data = build("mlp"), labelled("mlp")
    group = trace(model, data[0][0]).groups[0]
    few = reference.wasserstein(model, group, data, per_class=2)
    assert not np.allclose(few, reference.wasserstein(model, group, data, per_class=3))


classes = st.lists(st.integers(1, 7), min_size=2, max_size=5)


@given(counts=classes, entries=st.integers(1, 3), projections=st.integers(1, 3), seed=st.integers(0, 9))
def test_largest_distance_equals_scipy(counts: list[int], entries: int, projections: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    x = rng.integers(-3, 4, (len(labels), entries, projections)) / 2.0  # with ties
    expected = np.zeros(entries)
    for e in range(entries):
        for a in range(len(counts)):
            for b in range(a):
                pairs = [
                    wasserstein_distance(x[labels == a, e, p], x[labels == b, e, p])
                    for p in range(projections)
                ]
                expected[e] = max(expected[e], np.mean(pairs))
    np.testing.assert_allclose(largest_distance(torch.tensor(x), labels), expected, rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = torch.randn(20, 11, 3), np.arange(20) % 3
    whole = largest_distance(x, labels)
    monkeypatch.setattr("sys.modules", __import__("sys").modules)
    import sys

    monkeypatch.setattr(sys.modules["secateur.score.wasserstein"], "_CHUNK", 100)
    np.testing.assert_array_equal(largest_distance(x, labels), whole)


def test_precise_where_the_offset_is_large() -> None:
    x = torch.tensor([1000.0, 1000.5, 1001.0, 1001.5]).reshape(4, 1, 1)
    assert largest_distance(x, np.array([0, 0, 1, 1]))[0] == 1.0
