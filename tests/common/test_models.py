"""What is read of a user's module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur.common.models import evaluation_mode, named_tensors


class Scaled(nn.Linear):
    """Keeps something that is no tensor in the state dict."""

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": 3, "names": ["a"]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["scale"] == 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Scaled(4, 8), nn.ReLU(), Scaled(8, 2))


def test_extra_state_is_no_tensor() -> None:
    assert list(named_tensors(net())) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_model_with_extra_state_is_pruned_saved_and_loaded(tmp_path: Path) -> None:
    model, x = net(), torch.randn(3, 4)
    graph = sc.trace(model, x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(model, plan, graph=graph)
    assert sc.verify(model, small, plan, x).difference < 1e-12
    sc.save(small, tmp_path)
    assert torch.equal(sc.load(tmp_path, net)(x), small(x))


def test_a_mode_is_switched_to_only_where_the_model_is_in_another() -> None:
    calls: list[bool] = []

    class Frozen(nn.Module):
        """Its batch norm stays in evaluation mode."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def train(self, mode: bool = True) -> Frozen:
            calls.append(mode)
            super().train(mode)
            self.norm.eval()
            return self

    model = Frozen().eval()
    calls.clear()
    with evaluation_mode(model):
        assert not model.training
    with evaluation_mode(model, training=True):
        assert (model.training, model.norm.training) == (True, False)
    assert calls == [True]
    assert not model.training
