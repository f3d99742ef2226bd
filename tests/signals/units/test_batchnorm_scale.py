from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import ScoreError, SettingError
from secateur.graph.trace import trace
from secateur.signals import BatchNormScale, score
from tests.helpers.models import TOPOLOGIES, build

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def test_a_unit_behind_one_normalisation() -> None:
    model = build("residual")
    with torch.no_grad():
        model.inner1[1].weight.mul_(torch.tensor([1.0, -1.0, 1.0, -2.0, 0.0]))
    scores = score(trace(model, IMAGE), signals="batchnorm_scale")["batchnorm_scale"]
    np.testing.assert_array_equal(scores["inner1.0"], model.inner1[1].weight.detach().abs().numpy())


@pytest.mark.parametrize(("how", "rule"), [("mean", np.mean), ("max", np.max), ("sum", np.sum)])
def test_a_stream_with_two_normalisations(how, rule) -> None:
    model = build("residual")
    scores = score(trace(model, IMAGE), signals=BatchNormScale(combine=how))["batchnorm_scale"]
    both = [m.weight.detach().abs().numpy() for m in (model.stem[1], model.norm1)]
    np.testing.assert_allclose(scores["stem.0"], rule(both, axis=0), rtol=1e-12)


def test_normalisations_that_read_the_unit_count_at_its_position() -> None:
    model = build("concat")
    graph = trace(model, TOPOLOGIES["concat"].inputs(2, torch.float64))
    scores = score(graph, signals="batchnorm_scale")["batchnorm_scale"]
    norms = [norm.weight.detach().numpy() for norm in model.norms]
    np.testing.assert_allclose(scores["layers.0"], (norms[1][6:] + norms[2][6:10]) / 2, rtol=1e-12)
    np.testing.assert_allclose(scores["layers.1"], norms[2][10:], rtol=1e-12)


def test_a_group_without_normalisation_is_scaled_by_one() -> None:
    scores = score(trace(build("plain"), IMAGE), signals="batchnorm_scale")["batchnorm_scale"]
    np.testing.assert_array_equal(scores["2"], np.ones(9))
    assert len(set(scores["0.0"])) == 7


@pytest.mark.parametrize("name", ["gated", "layer_norm"])  # the layer norm's own group is left alone
def test_a_model_without_any_is_refused(name: str) -> None:
    graph = trace(build(name), TOPOLOGIES[name].inputs(2, torch.float64))
    with pytest.raises(ScoreError, match=r"batchnorm_scale: expected a normalisation .* got none in"):
        score(graph, signals="batchnorm_scale")


def test_a_normalisation_without_weights_counts_for_none() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(ScoreError, match="expected a normalisation with weights"):
        score(trace(net, torch.randn(2, 3)), signals="batchnorm_scale")


def test_settings() -> None:
    with pytest.raises(SettingError, match="batchnorm_scale: expected combine"):
        BatchNormScale(combine="all")  # type: ignore[arg-type]
