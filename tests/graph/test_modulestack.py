"""Submodules whose first call fails, which the model's own code catches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from secateur.graph.capture import capture, failed_calls_left


class Tried(nn.Module):
    """Gives lengths to layers, and those that take none only the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x


def test_a_call_that_fails_and_is_caught_does_not_stop_a_capture() -> None:
    model = Tried().eval()
    found = capture(model, (torch.randn(2, 3),), {})
    x = torch.randn(5, 3)
    assert torch.equal(found.program.module()(x), model(x))


def test_the_tracer_is_as_before_after_an_error() -> None:
    own = fx.Tracer.call_module
    with pytest.raises(ValueError, match="stop"), failed_calls_left():
        raise ValueError("stop")
    assert fx.Tracer.call_module is own
