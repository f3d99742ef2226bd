"""Units that a constant makes of the inputs, such as random features: no parameter is in front of them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc


@dataclass
class Held:
    features: Tensor


PLACES: dict[str, Any] = {
    "attribute": lambda t: t,
    "dictionary": lambda t: {"features": t},
    "list": lambda t: [t, 1],
    "pair": lambda t: (t, None),
    "object": Held,
    "namespace": lambda t: SimpleNamespace(features=t),
    "buffer": None,
}


class Features(nn.Module):
    """A fixed random matrix in front of two layers, in single precision and kept in some place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
        self.place, features = place, torch.randn(6, 8)
        if place == "buffer":
            self.register_buffer("kept", features)
        else:
            self.kept = PLACES[place](features)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]"""
        kept: Any = self.kept
        if self.place in ("object", "namespace"):
            kept = kept.features
        elif self.place in ("dictionary", "list", "pair"):
            kept = kept["features" if self.place == "dictionary" else 0]
        return self.o(self.a((x @ kept).sin()).relu())


@pytest.mark.parametrize("place", PLACES)
def test_the_whole_pipeline_takes_them(place: str) -> None:
    """Signals that ask for gradients of activations too, and the proof in double precision."""
    torch.manual_seed(0)
    model = Features(place).eval()
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(4)]
    graph = sc.trace(model, data[0][0])
    scores = sc.score(graph, data, signals="fisher")
    front = next(group.name for group in graph.groups if group.size == 8)
    assert (scores["fisher"][front] > 0).all()
    result = sc.prune(model, data, sc.Budget(params=0.6), progress=False, measure_latency=False)
    assert result.report.proof["difference"] <= 1e-9
    with torch.no_grad():
        assert result.model(data[0][0]).shape == (16, 3)


def test_its_gradient_is_that_of_the_loss() -> None:
    """As with a weight in the place of the constant, which reaches the loss in the same way."""
    torch.manual_seed(0)
    model = Features("buffer").eval()
    learnt = nn.Sequential(nn.Linear(6, 8, bias=False), Sine(), model.a, nn.ReLU(), model.o).eval()
    with torch.no_grad():
        learnt[0].weight.copy_(model.kept.t())
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,)))]
    found = []
    for one in (model, learnt):
        graph = sc.trace(one, data[0][0])
        name = next(group.name for group in graph.groups if group.size == 8)
        found.append(sc.score(graph, data, signals="fisher")["fisher"][name])
    np.testing.assert_allclose(*found, rtol=1e-4)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Hyper(nn.Module):
    """A network whose weights another one makes of a vector: its neurons have no axis of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.o = nn.Parameter(torch.randn(5)), nn.Linear(16, 3)
        self.makes = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 7 * 16))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]"""
        made = self.makes(self.code)
        return self.o(nn.functional.linear(x, made[:96].view(16, 6), made[96:]).relu())


@pytest.mark.parametrize("signal", ["reconstruction", "activation", "fluctuation", "wanda", "fisher"])
def test_neurons_without_an_axis_of_samples_are_scored_or_refused_in_words(signal: str) -> None:
    torch.manual_seed(0)
    model = Hyper().eval()
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(4)]
    graph = sc.trace(model, data[0][0])
    if signal in ("activation", "fisher"):  # which tell samples apart
        with pytest.raises(sc.SecateurError, match="expected an axis of 16 samples at relu, got shape"):
            sc.score(graph, data, signals=signal)
        return
    scores = sc.score(graph, data, signals=signal)
    assert all(np.isfinite(scores[signal][group.name]).all() for group in graph.groups)


def test_a_network_that_makes_weights_goes_through_the_whole_pipeline() -> None:
    torch.manual_seed(0)
    data = [torch.randn(16, 6) for _ in range(4)]
    result = sc.prune(Hyper().eval(), data, sc.Budget(macs=0.7), progress=False, measure_latency=False)
    assert result.report.proof["difference"] <= 1e-9
