"""Feature tables and configurations follow where that can be proven."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from tests.targets.units.plans import plan_of


class Features(nn.Module):
    """A network with timm's table of feature maps, and a hidden layer in its head as wide as the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 10, 1)
        self.hidden, self.fc = nn.Linear(10, 10), nn.Linear(10, 2)
        self.num_features = self.head_hidden_size = 10
        self.feature_info = [
            {"num_chs": 6, "reduction": 1, "module": "stem"},
            {"num_chs": 10, "reduction": 1, "module": "body"},
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.body(F.relu(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.relu(self.hidden(x.mean((2, 3))))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("gone", [(1, 2, 3), (0, 0, 3), (0, 2, 0)])
def test_feature_tables_follow_and_come_back(tmp_path: Path, gone: tuple[int, int, int]) -> None:
    model, x = Features().eval(), torch.randn(2, 3, 4, 4)
    graph = sc.trace(model, x)
    keep = {n: np.arange(graph[n].size) >= k for n, k in zip(("stem", "body", "hidden"), gone, strict=True)}
    small = sc.apply(model, plan_of(graph, keep), graph=graph, example_inputs=x)
    sc.save(small, tmp_path)
    for pruned in (small, sc.load(tmp_path, lambda: Features().eval())):
        assert [entry["num_chs"] for entry in pruned.feature_info] == [6 - gone[0], 10 - gone[1]]
        assert (pruned.num_features, pruned.head_hidden_size) == (10 - gone[1], 10 - gone[2])
    assert [entry["num_chs"] for entry in model.feature_info] == [6, 10]


class Config:
    """A configuration as Hugging Face's models have one."""

    def __init__(self, intermediate_size: int = 12, num_heads: int = 3, hidden_size: int = 12) -> None:
        self.intermediate_size, self.num_heads, self.hidden_size = intermediate_size, num_heads, hidden_size

    def to_dict(self) -> dict[str, int]:
        return vars(self)


class Configured(nn.Module):
    """Two blocks of equal width, read from a configuration whose fields share a value."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.into = nn.Linear(3, config.hidden_size)
        self.up = nn.ModuleList(nn.Linear(config.hidden_size, config.intermediate_size) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(config.intermediate_size, config.hidden_size) for _ in range(2))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(self.norm(x))))
        return x


@pytest.mark.parametrize(("gone", "field"), [((5, 5), 7), ((5, 4), 12)])
def test_a_configuration_follows_if_it_can_say_it(gone: tuple[int, int], field: int) -> None:
    model, x = Configured(Config()).eval(), torch.randn(2, 3)
    graph = sc.trace(model, x)
    assert [g.size for g in graph.groups] == [12, 12]
    keep = {g.name: np.arange(g.size) >= n for g, n in zip(graph.groups, gone, strict=True)}
    small = sc.apply(model, plan_of(graph, keep), graph=graph, example_inputs=x)
    assert small.config.intermediate_size == field
    assert (small.config.hidden_size, small.config.num_heads) == (12, 3)
    assert model.config.intermediate_size == 12
    if field == 7:
        fresh = Configured(small.config)
        fresh.load_state_dict(small.state_dict())
        assert torch.equal(fresh(x), small(x))
