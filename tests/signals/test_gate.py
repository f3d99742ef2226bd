"""Fisher and per-sample Taylor: signals of each sample's own gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.graph.trace import trace
from secateur.signals import score
from tests.helpers.models import build
from tests.signals import literal
from tests.signals.data import labelled


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        *(
            (name, torch.float64, 1e-9)
            for name in ("residual", "mlp", "gated", "flatten_to_linear", "conv1d")
        ),
        ("residual", torch.float32, 1e-3),
    ],
)
def test_equals_the_formula(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, data = build(name, dtype), labelled(name, (5, 3), dtype)
    graph = trace(model, data[0][0])
    scores = score(graph, data, ("fisher", "taylor_sample"))
    for group in graph.groups:
        d = literal.derivatives(model, name, group, data)
        expected = {"fisher": (d**2).mean(0) / 2, "taylor_sample": np.abs(d).mean(0)}
        for signal, vector in expected.items():
            found = scores[signal][group.name]
            np.testing.assert_allclose(found, vector, rtol=tolerance, atol=tolerance * vector.max())
            assert vector.max() > 1e-8


def test_is_the_derivative_of_scaling_the_unit() -> None:
    """A factor on a residual stream's unit reaches every layer that adds to it; checked by differences."""
    model, x = build("residual"), labelled("residual", (3,))[0][0][:1]
    batch = (x, torch.tensor([2]))
    graph = trace(model, batch[0])
    found = score(graph, [batch], "taylor_sample")["taylor_sample"]["stem.0"]

    def loss(factor: float, unit: int) -> float:
        def scale(_m, _i, out):
            out = out.clone()
            out[:, unit] *= factor
            return out

        hooks = [m.register_forward_hook(scale) for m in (model.stem, model.norm1)]
        with torch.no_grad():
            value = float(F.cross_entropy(model(batch[0]), batch[1]))
        for hook in hooks:
            hook.remove()
        return value

    slopes = [(loss(1 + 1e-5, j) - loss(1 - 1e-5, j)) / 2e-5 for j in range(8)]
    np.testing.assert_allclose(found, np.abs(slopes), rtol=1e-5, atol=1e-9)


def test_samples_of_opposite_sign_do_not_cancel() -> None:
    """Two samples whose losses want opposite things of a unit: nothing for `taylor`, much for each."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[1].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))  # equal logits, so both classes at 1/2
    data = [(torch.ones(2, 1, dtype=torch.float64), torch.tensor([0, 1]))]
    scores = score(trace(net, data[0][0]), data, ("taylor", "taylor_sample", "fisher"))
    np.testing.assert_allclose(scores["taylor"]["0"], [0.0, 0.0], atol=1e-15)
    np.testing.assert_allclose(scores["taylor_sample"]["0"], [1.0, 1.0], rtol=1e-12)
    np.testing.assert_allclose(scores["fisher"]["0"], [0.5, 0.5], rtol=1e-12)
