from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import CalibrationError
from secateur.graph.trace import trace
from secateur.signals import score
from tests.helpers.models import build
from tests.signals import reference
from tests.signals.data import labelled


@pytest.mark.parametrize("name", ["residual", "plain", "gated", "tied_linear", "grouped", "functional"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_equals_the_formula(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, data = build(name, dtype), labelled(name, dtype=dtype)
    graph = trace(model, data[0][0])
    scores = score(graph, data, "taylor")["taylor"]
    for group in graph.groups:
        expected = reference.taylor(model, graph, group, data)
        np.testing.assert_allclose(scores[group.name], expected, rtol=tolerance, atol=tolerance * 1e-2)
        assert expected.max() > 1e-4


def test_batches_may_be_cut_anyhow() -> None:
    model, data = build("plain"), labelled("plain", (20,))
    graph = trace(model, data[0][0])
    x, y = data[0]
    whole = score(graph, data, "taylor")["taylor"]
    cut = score(graph, list(zip(x.split(6), y.split(6), strict=True)), "taylor")["taylor"]
    for group in graph.groups:
        np.testing.assert_allclose(cut[group.name], whole[group.name], rtol=1e-9, atol=1e-14)


def test_frozen_parameters_are_scored_all_the_same() -> None:
    model, data = build("residual"), labelled("residual")
    trainable = score(trace(model, data[0][0]), data, "taylor")["taylor"]
    model.requires_grad_(False)
    frozen = score(trace(model, data[0][0]), data, "taylor")["taylor"]
    for group, scores in trainable.items():
        np.testing.assert_array_equal(frozen[group], scores)
    assert not any(p.requires_grad for p in model.parameters())


def test_units_may_be_permuted() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ).double()
    data, order = labelled("plain"), torch.tensor([3, 1, 5, 0, 2, 4])
    before = score(trace(net, data[0][0]), data, "taylor")["taylor"]["0"]
    with torch.no_grad():
        for tensor, axis in ((net[0].weight, 0), (net[0].bias, 0), (net[4].weight, 1)):
            tensor.copy_(tensor.index_select(axis, order))
    after = score(trace(net, data[0][0]), data, "taylor")["taylor"]["0"]
    np.testing.assert_allclose(after, before[order.numpy()], rtol=1e-9)


def test_own_loss_sees_the_loaders_batch_and_calls_the_model() -> None:
    model, data = build("mlp"), labelled("mlp")
    graph = trace(model, data[0][0])
    seen = []

    def loss_fn(run, batch):
        seen.append(batch)
        return F.cross_entropy(run(batch[0]), batch[1])

    own = score(graph, data, "taylor", loss_fn=loss_fn)["taylor"]
    usual = score(graph, data, "taylor")["taylor"]
    assert all(a[0] is b[0] for a, b in zip(seen, data, strict=True))
    for group in graph.groups:
        np.testing.assert_array_equal(own[group.name], usual[group.name])
        doubled = score(graph, data, "taylor", loss_fn=lambda m, b: 2 * loss_fn(m, b))["taylor"]
        np.testing.assert_allclose(doubled[group.name], 2 * usual[group.name], rtol=1e-12)


def test_parameters_that_do_not_reach_the_loss_score_nothing() -> None:
    model, data = build("dict_output"), labelled("dict_output")
    graph = trace(model, data[0][0])
    scores = score(graph, data, "taylor", loss_fn=lambda m, b: m(b[0])["logits"].square().mean() * 0)
    assert not any(v.any() for v in scores["taylor"].values())


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: m(b[0]), r"loss: expected a tensor of one real number.* got torch.float64 \[7, 5\]"),
        (lambda m, b: 1.0, "loss: expected a tensor of one real number.* got float"),
        (lambda m, b: m(b[0]).detach().mean(), "loss: expected one that depends on the model's parameters"),
        (lambda m, b: m(b[0]).mean() * float("inf"), "batch 0: loss: expected a finite number, got -?inf"),
    ],
)
def test_losses_that_cannot_be_used(loss_fn, message: str) -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    with pytest.raises(CalibrationError, match=message):
        score(graph, data, "taylor", loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "batch 0: signal taylor: loss: expected labels, got none"),
        (torch.tensor([0, 9, 1]), "labels: expected classes from 0 to 4.* got label 9"),
        (
            torch.tensor([0, 1]),
            r"loss: expected integer labels \[3\], or floating ones .* \[3, 5\], got torch.int64 \[2\]",
        ),
        (torch.rand(3, 4), r"got torch.float32 \[3, 4\]. Pass loss_fn"),
    ],
)
def test_labels_that_the_default_loss_cannot_use(labels: torch.Tensor | None, message: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    graph = trace(build("mlp"), x)
    with pytest.raises(CalibrationError, match=message):
        score(graph, [(x, labels)], "taylor")


def test_an_output_without_logits_needs_a_loss_of_its_own() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.b(self.a(x).relu())
            return x, x

    x = torch.randn(3, 3)
    with pytest.raises(CalibrationError, match="expected the model to return logits, got tuple"):
        score(trace(Pair(), x), [(x, torch.tensor([0, 1, 1]))], "taylor")
