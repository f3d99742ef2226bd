"""Memory of a forward pass: what can be counted by hand is what is measured."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import SettingError
from secateur.measure.memory import memory


def test_a_network_that_can_be_counted_by_hand() -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    found = memory(net, (torch.zeros(50, 16),))
    assert found.weights == sum(p.nbytes for p in net.parameters())
    # At the ReLU: the inputs, what goes into it, and what comes out of it.
    assert found.activations == 50 * (16 + 32 + 32) * 4
    assert found.total == found.weights + found.activations
    assert memory(net, (torch.zeros(100, 16),)).activations == 2 * found.activations


def test_what_lives_at_the_same_time_counts_and_what_is_gone_does_not() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                y = x.exp()  # of these one lives, or two while one takes the other's place
            return x + y

    assert memory(Branches(), (torch.zeros(1000),)).activations == 3 * 4000


def test_a_pruned_network_takes_less_and_the_model_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)).train()
    x = torch.randn(4, 3, 12, 12)
    graph = sc.trace(net, x)
    plan = sc.Uniform(ratio=0.5).allocate(graph, sc.score(graph, None, "magnitude"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    whole, part = memory(net, (x,)), memory(sc.apply(net, plan, graph=graph), (x,))
    assert part.weights < whole.weights
    assert part.activations < whole.activations
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    masked = memory(sc.apply(net, plan, "masked", graph=graph), (x,))
    assert masked.weights == whole.weights


class Cached(nn.Module):
    """A model with a cache of four numbers a token and layer; with `window`, of as many tokens at most."""

    def __init__(self, layers: int = 3, window: int = 10_000) -> None:
        super().__init__()
        self.layers, self.window = layers, window
        self.embed = nn.Embedding(7, 4)

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
        x = self.embed(input_ids)
        cache = [(x[:, -self.window :],) for _ in range(self.layers)] if use_cache else None
        return SimpleNamespace(logits=x, past_key_values=cache)


@pytest.mark.parametrize("length", [3, 40])
def test_the_cache_is_what_a_token_takes(length: int) -> None:
    model, ids = Cached(), torch.zeros(2, length, dtype=torch.long)
    found = memory(model, (ids,), tokens=4096)
    assert found.cache == 2 * 4096 * 3 * 4 * 4
    assert memory(model, (ids,)).cache == 0
    assert found.activations == memory(model, (ids,)).activations


def test_a_cache_that_stops_growing_is_not_taken_for_more_than_it_is() -> None:
    found = memory(Cached(window=5), (torch.zeros(2, 30, dtype=torch.long),), tokens=4096)
    assert found.cache == 2 * 5 * 3 * 4 * 4


def test_tokens_of_a_model_without_a_cache_are_refused() -> None:
    with pytest.raises(SettingError, match=r"key-value cache .* tokens=16, got Linear, .* Leave tokens out"):
        memory(nn.Linear(4, 4), (torch.zeros(2, 4),), tokens=16)


def test_the_profiler_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    memory(nn.Linear(4, 4), (torch.zeros(2, 4),))
    assert dict(os.environ) == before
