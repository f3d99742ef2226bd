"""Activation, APoZ and rank: signals that average a number over what a unit shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import ScoreError, SettingError
from secateur.graph.groups import Group, Site
from secateur.graph.trace import trace
from secateur.signals import Activation, APoZ, Rank, Signal, score
from secateur.signals.observed import check_observable, sites_at
from tests.helpers.models import TOPOLOGIES, build
from tests.signals import literal
from tests.signals.data import labelled

MEASURES = {
    "mean": (Activation, {}, lambda a: a.abs().mean()),
    "energy": (Activation, {"measure": "energy"}, lambda a: (a * a).mean()),
    "apoz": (APoZ, {}, lambda a: 1 - float((a <= 0).sum()) / a.numel()),
    "rank": (Rank, {}, lambda a: np.linalg.matrix_rank(matrix(a).numpy())),
}


def matrix(a: torch.Tensor) -> torch.Tensor:
    """A map as rows and columns: [rows, columns]."""
    return a.reshape(-1, a.shape[-1]) if a.ndim > 1 else a.reshape(1, -1)


@pytest.mark.parametrize("name", ["residual", "mlp", "gated", "flatten_to_linear", "conv1d", "conv3d"])
def test_equals_the_formula(name: str) -> None:
    model, data = build(name), labelled(name, (3, 2))
    graph = trace(model, data[0][0])
    for kind, settings, number in MEASURES.values():
        for how in ("mean", "max") if name in ("residual", "gated") else ("mean",):
            signal: Signal = kind(combine=how, **settings)
            scores = score(graph, data, signal)[signal.name]
            for group in graph.groups:
                expected = literal.observed(model, name, group, data, number, how)
                np.testing.assert_allclose(scores[group.name], expected, rtol=1e-9, atol=1e-14)
                assert expected.max() > 0


def test_apoz_behind_a_relu_is_one_minus_the_share_of_zeros() -> None:
    model, data = build("plain"), labelled("plain")
    scores = score(trace(model, data[0][0]), data, "apoz")["apoz"]["0.0"]
    with torch.no_grad():
        shown = model[0](torch.cat([x for x, _ in data]))
    np.testing.assert_allclose(scores, 1 - (shown == 0).double().mean((0, 2, 3)).numpy(), rtol=1e-12)


def test_maps_of_known_rank() -> None:
    """Filters that copy the input keep its rank; a filter of zeros with a bias has rank 1, without one 0."""
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.0]).reshape(4, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, 0.0, 3.0, 0.0]))
    generator = torch.Generator().manual_seed(0)

    def of_rank(rank: int) -> torch.Tensor:
        left, right = (torch.randn(6, rank, generator=generator, dtype=torch.float64) for _ in range(2))
        return (left @ right.T)[None, None]

    data = [torch.cat([of_rank(1), of_rank(4)]), of_rank(6)]
    scores = score(trace(net, data[0]), data, "rank")["rank"]["0"]
    np.testing.assert_allclose(scores, [11 / 3, 11 / 3, 1.0, 0.0], rtol=1e-12)


def test_rank_of_channels_last_windows_and_half_precision() -> None:
    model = build("channels_last")
    data = labelled("channels_last", (3, 2))
    scores = score(trace(model, data[0][0]), data, "rank")["rank"]["up"]
    with torch.no_grad():
        x = model.stem(torch.cat([x for x, _ in data])).permute(0, 2, 3, 1)
        shown = nn.functional.gelu(model.up(x)).permute(0, 3, 1, 2)
    np.testing.assert_allclose(scores, torch.linalg.matrix_rank(shown).double().mean(0), rtol=1e-12)
    half = [(x.bfloat16(), y) for x, y in labelled("plain", (3, 2))]
    rough = score(trace(build("plain", torch.bfloat16), half[0][0]), half, "rank")["rank"]["0.0"]
    assert ((rough > 0) & (rough <= 8)).all()


def test_maps_of_any_size_have_their_own_rank() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    graph = trace(net, torch.randn(2, 1, 4, 6))
    eye, flat = torch.eye(3)[None, None], torch.ones(1, 1, 12, 2)  # of the first 12 numbers none is a column
    found = [
        score(graph, data, "rank", progress=False)["rank"]["0"][0] for data in ([eye], [flat], [eye, flat])
    ]
    assert found == [3, 1, 2]


def test_which_sites() -> None:
    graph = trace(build("residual"), TOPOLOGIES["residual"].inputs(2, torch.float64))
    stages = {s.producer: s.stage for g in graph.groups for s in sites_at(g, "activated")}
    assert stages == {
        "stem.0.weight": "activated",
        "inner1.0.weight": "activated",
        "outer1.weight": "normalised",  # the activation follows the addition
        "inner2.0.weight": "activated",
        "outer2.weight": "normalised",
        "project.weight": "produced",
    }
    assert {s.stage for g in graph.groups for s in sites_at(g, "produced")} == {"produced"}


def test_units_that_do_not_show() -> None:
    site = Site("n", 1, "produced", "w", np.array([0, 2]), np.array([0, 2]))
    group = Group("g", 4, (), (site,), True)
    with pytest.raises(ScoreError, match="apoz, group g: expected every unit to be observable, got 2 of 4"):
        check_observable(APoZ(), group)


def test_settings() -> None:
    with pytest.raises(SettingError, match="activation: expected measure to be mean or energy, got 'sum'"):
        Activation(measure="sum")  # type: ignore[arg-type]
    for kind in (Activation, APoZ, Rank):
        with pytest.raises(SettingError, match=f"{kind.name}: expected combine to be one of sum, mean, max"):
            kind(combine="all")
