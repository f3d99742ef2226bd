from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import SettingError
from secateur.graph.trace import trace
from secateur.signals import L1, Magnitude, score
from tests.helpers.models import build
from tests.signals import literal

BOTH = ("produce", "consume")


def small() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 5.0], [0.0, 0.0]]))
        net[0].bias.copy_(torch.tensor([100.0, 0.0, 50.0]))
        net[1].weight.copy_(torch.tensor([3.0, -2.0, 1.0]))
        net[1].bias.copy_(torch.tensor([0.0, 40.0, 0.0]))
        net[1].running_var.copy_(torch.tensor([9.0, 1.0, 1.0]))
        net[3].weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 0.0]]))
    return net


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        # Producing norms 5, 5, 0, scales 3, 2, 1 and consuming norms √2, 0, 2, each over its mean, averaged.
        (Magnitude(), [(1.5 + 1.5 + 3 * 2**0.5 / (2**0.5 + 2)) / 3, 2.5 / 3, (0.5 + 6 / (2**0.5 + 2)) / 3]),
        (Magnitude(roles=BOTH), [(1.5 + 3 * 2**0.5 / (2**0.5 + 2)) / 2, 0.75, (6 / (2**0.5 + 2)) / 2]),
        (Magnitude(p=1, roles=BOTH), [(1.75 + 1.5) / 2, 1.25 / 2, 0.75]),
        (Magnitude(p=1, roles=BOTH, combine="max"), [1.75, 1.25, 1.5]),
        (Magnitude(p=1, roles=BOTH, combine="sum"), [3.25, 1.25, 1.5]),
        (Magnitude(roles=("produce",)), [1.5, 1.5, 0.0]),
        (Magnitude(roles=("scale",)), [1.5, 1.0, 0.5]),
        (Magnitude(p=1, roles=("consume",)), [1.5, 0.0, 1.5]),
    ],
)
def test_by_hand(signal: Magnitude, expected: list[float]) -> None:
    scores = score(trace(small(), torch.randn(2, 2)), signals=signal)["magnitude"]["0"]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_tensors_of_zeros_score_nothing() -> None:
    net = small()
    torch.nn.init.zeros_(net[0].weight)
    torch.nn.init.zeros_(net[1].weight)
    torch.nn.init.zeros_(net[3].weight)
    scores = score(trace(net, torch.randn(2, 2)), signals="magnitude")["magnitude"]["0"]
    np.testing.assert_array_equal(scores, np.zeros(3))


def test_scale_of_a_tensor_does_not_matter_but_its_proportions_do() -> None:
    model = build("residual")
    graph = trace(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    before = score(graph, signals="magnitude")["magnitude"]
    with torch.no_grad():
        model.outer1.weight.mul_(7.0)
    after = score(graph, signals="magnitude")["magnitude"]
    for group in graph.groups:
        np.testing.assert_allclose(after[group.name], before[group.name], rtol=1e-12)
    with torch.no_grad():
        model.outer1.weight[0].mul_(7.0)
    assert not np.allclose(score(graph, signals="magnitude")["magnitude"]["stem.0"], before["stem.0"])


def test_units_of_several_positions_count_all_of_them() -> None:
    model = build("gated")
    graph = trace(model, torch.randn(2, 6, dtype=torch.float64))
    weight = model.first.weight.detach().numpy()
    norms = np.sqrt((weight[:8] ** 2).sum(1) + (weight[8:] ** 2).sum(1))
    scores = score(graph, signals=Magnitude(roles=("produce",)))["magnitude"]["first"]
    np.testing.assert_allclose(scores, norms / norms.mean(), rtol=1e-12)


def test_settings_out_of_range() -> None:
    with pytest.raises(SettingError, match="expected p of 1 or 2, got 3"):
        Magnitude(p=3)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="expected roles among produce, scale and consume"):
        Magnitude(roles=("eat",))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="expected roles"):
        Magnitude(roles=())
    with pytest.raises(SettingError, match="l1: expected combine to be one of sum, mean, max, got 'min'"):
        L1(combine="min")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="p"):
        L1(p=2)  # type: ignore[call-arg]


def test_by_their_own_names() -> None:
    graph = trace(build("residual"), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    scores = score(graph, signals=("l1", "l2", "magnitude"))
    one = score(graph, signals=Magnitude(p=1))["magnitude"]
    for group in graph.groups:
        np.testing.assert_array_equal(scores["l1"][group.name], one[group.name])
        np.testing.assert_array_equal(scores["l2"][group.name], scores["magnitude"][group.name])
        assert not np.allclose(one[group.name], scores["l2"][group.name])


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize(
    ("p", "norm"), [(1, lambda w: np.abs(w).sum()), (2, lambda w: np.sqrt((w * w).sum()))]
)
def test_residual_stream_equals_the_formula(p, norm, how) -> None:
    model = build("residual")
    graph = trace(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    tensors = [
        ("stem.0.weight", 0), ("stem.1.weight", 0), ("inner1.0.weight", 1), ("outer1.weight", 0),
        ("norm1.weight", 0), ("inner2.0.weight", 1), ("project.weight", 1),
    ]  # fmt: skip
    group = graph["stem.0"]
    expected = literal.of_tensors(
        model, group, tensors, lambda rows: {u: float(norm(w)) for u, w in rows.items()}, how
    )
    found = score(graph, signals=Magnitude(p=p, combine=how))["magnitude"][group.name]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
