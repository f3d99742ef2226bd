"""Repairability of units: what is measured, against masking by hand, and what the rule makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocators import Distortion, Limits, Repairability, unit_distortions
from secateur.errors import ScoreError, SettingError
from tests.allocators.fake import FakeGraph, random_scores

GRID = (0.0, 0.3, 0.5, 0.8, 1.0)


class Net(nn.Module):
    """Channels that two layers read, a concatenation, heads, and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 5, 3, padding=1)
        self.right = nn.Conv2d(6, 4, 1)
        self.both = nn.Conv2d(9, 8, 1)
        self.attend = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 2, 4, 4] to [batch, 3]."""
        x = torch.relu(self.norm(self.first(x)))
        x = self.both(torch.relu(torch.cat([self.left(x), self.right(x)], 1))).flatten(2).transpose(1, 2)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(x.flatten(1))


def network() -> Net:
    torch.manual_seed(0)
    net = Net().double().eval()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.6, 0.6)
    return net


MODEL = network()
DATA = list(torch.randn(3, 8, 2, 4, 4, generator=torch.Generator().manual_seed(1)).double())
GRAPH = sc.trace(MODEL, DATA[0])
SCORES = sc.score(GRAPH, None, "magnitude", progress=False)
CURVES = unit_distortions(GRAPH, DATA, SCORES, "magnitude", grid=GRID, progress=False)


def rows(y: Tensor) -> Tensor:
    """[positions, outputs] of a map, a sequence or a vector."""
    return y.movedim(1, -1).flatten(0, -2) if y.ndim == 4 else y.flatten(0, -2)


def literal(y: Tensor, z: Tensor) -> tuple[float, float]:
    """Distortions, an output after the other."""
    matched = torch.empty_like(y)
    for k in range(y.shape[1]):
        spread = z[:, k].std(unbiased=False)
        scale = y[:, k].std(unbiased=False) / spread if spread > 1e-9 else 0.0
        matched[:, k] = (z[:, k] - z[:, k].mean()) * scale + y[:, k].mean()
    energy = y.square().sum()
    return float((z - y).square().sum() / energy), float((matched - y).square().sum() / energy)


def readers(group: str, gone: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """What each reader of a group gives in the dense model, and without some units, by hand."""
    index = torch.as_tensor(gone.copy())
    with torch.no_grad():
        x = torch.cat(DATA)
        a = torch.relu(MODEL.norm(MODEL.first(x)))
        b = torch.relu(torch.cat([MODEL.left(a), MODEL.right(a)], 1))
        if group == "first":
            less = a.clone()
            less[:, index] = 0
            return [(rows(layer(a)), rows(layer(less))) for layer in (MODEL.left, MODEL.right)]
        if group in ("left", "right"):
            less = b.clone()
            less[:, index + (0 if group == "left" else 5)] = 0
            return [(rows(MODEL.both(b)), rows(MODEL.both(less)))]
        s = MODEL.both(b).flatten(2).transpose(1, 2)
        q, k, v = (
            p.unflatten(2, (4, 2)).transpose(1, 2)
            for p in nn.functional.linear(s, MODEL.attend.in_proj_weight, MODEL.attend.in_proj_bias).chunk(
                3, 2
            )
        )
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        less = heads.clone()
        less[:, index] = 0
        out = [MODEL.attend.out_proj(h.transpose(1, 2).flatten(2)) for h in (heads, less)]
        return [(rows(out[0]), rows(out[1]))]


def test_there_is_a_curve_of_channels_and_heads() -> None:
    sizes = {group.name: group.size for group in GRAPH.groups}
    assert {"first": 6, "left": 5, "right": 4}.items() <= sizes.items()
    assert set(CURVES) == set(sizes)
    assert {name: curve.readers for name, curve in CURVES.items() if name in ("first", "left")} == {
        "first": 2,
        "left": 1,
    }
    assert 4 in [sizes[name] for name in sizes if "attend" in name]


@pytest.mark.parametrize("group", [g.name for g in GRAPH.groups if g.name != "both"])
def test_curves_equal_masking_each_group_alone(group: str) -> None:
    size, curve = GRAPH[group].size, CURVES[group]
    counts = sorted({round(s * size) for s in GRID})
    assert curve.sparsity.tolist() == [k / size for k in counts]
    order = np.argsort(SCORES["magnitude"][group], kind="stable")
    for k, count in enumerate(counts):
        found = [literal(y, z) for y, z in readers(group, order[:count])]
        raw, repaired = np.mean(found, 0)
        assert curve.raw[k] == pytest.approx(raw, abs=1e-9)
        assert curve.repaired[k] == pytest.approx(repaired, abs=1e-9)
    variance = [
        float((y - y.mean(0)).square().sum() / y.square().sum()) for y, _ in readers(group, order[:0])
    ]
    assert curve.whole == pytest.approx(np.mean(variance))
    # All that these read is gone, but for what is concatenated with the other.
    assert (curve.repaired[-1] == pytest.approx(curve.whole)) == (group not in ("left", "right"))


def test_what_measuring_promises() -> None:
    before = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    again = unit_distortions(GRAPH, [torch.cat(DATA)], SCORES, "magnitude", grid=GRID, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in MODEL.state_dict().items())
    for name, curve in CURVES.items():  # however the samples are cut into batches
        np.testing.assert_allclose(again[name].repaired, curve.repaired, rtol=1e-9, atol=1e-12)
    with pytest.raises(ScoreError, match="expected scores of signal 'l1', got only 'magnitude'"):
        unit_distortions(GRAPH, DATA, SCORES, "l1")


def test_the_pipeline_measures_curves() -> None:
    data = [(x, torch.arange(8) % 3) for x in DATA + DATA]
    result: Any = sc.prune(
        MODEL, data, sc.Budget(macs=0.6), Repairability(removal="l2"), measure_latency=False, progress=False
    )
    assert result.plan.predicted.macs <= 0.6 * result.plan.dense.macs
    found = result.plan.certificates["residual"]
    assert found
    assert all(0 < value < 2 for value in found.values())
    assert result.plan.settings["removal"] == "l2"


def linear(factor: float = 1.0) -> Distortion:
    s = np.linspace(0, 1, 101)
    return Distortion(s, s, factor * s**2, 1.0)


def test_a_unit_is_charged_by_what_it_costs() -> None:
    graph: Any = FakeGraph([20, 20], area=5)
    scores = random_scores(graph, 0)
    curves = {"layer0": linear(), "layer1": linear()}

    def kept(per: Any, sparing: dict[str, Distortion] = curves) -> list[int]:
        rule = Repairability(sparing, per=per)
        return [
            g.kept for g in rule.allocate(graph, scores, sc.Budget(params=0.5, spend=False), Limits()).groups
        ]

    even = kept("unit")
    assert even[0] == even[1]  # equal curves, equal sizes
    # A unit of the first layer has 3 inputs and 40 readers, one of the second 40 inputs and 20.
    (one, two), (macs_one, macs_two) = kept("params"), kept("macs")
    assert one > two
    assert macs_one > macs_two
    assert kept(None) == kept("params")  # what the budget bounds
    # The optimum for quadratic shares: what is gone is in proportion to what a unit costs.
    assert (20 - one) / (20 - two) == pytest.approx((3 + 1 + 40) / (40 + 1 + 20), abs=0.12)
    # What is spared is what repair leaves more of.
    assert kept("unit", {"layer0": linear(4), "layer1": linear()})[0] > even[0] + 2
    # What two layers read is lost to both.
    once, twice = linear(), replace(linear(), readers=2)
    s = np.linspace(0, 1, 11)
    np.testing.assert_allclose(twice.price(s), 2 * once.price(s))
    with pytest.raises(SettingError, match="expected per to be 'unit', 'macs' or 'params', got 'flops'"):
        Repairability(per="flops")  # type: ignore[arg-type]


def test_forced_in_and_out() -> None:
    graph: Any = FakeGraph([20, 30, 40])
    scores = random_scores(graph, 1)
    curves = {name: linear(f) for name, f in (("layer0", 1), ("layer2", 9))}
    rule = Repairability(curves, along=("layer1",))
    plan = rule.allocate(graph, scores, sc.Budget(macs=0.4, spend=False), Limits())
    gone = {g.name: len(g.removed) for g in plan.groups}
    share = (gone["layer0"] + gone["layer2"]) / 60
    assert 0.1 < share
    assert gone["layer1"] == int(share * 30)
    order = np.argsort(scores["magnitude"]["layer1"], kind="stable")
    assert sorted(order[: gone["layer1"]].tolist()) == sorted(plan.groups[1].removed)
    both = Repairability(curves, dense=("layer1",), along=("layer*1",))  # out wins
    plan = both.allocate(graph, scores, sc.Budget(macs=0.6), Limits())
    assert not plan.groups[1].removed
    with pytest.raises(SettingError, match=r"expected each pattern of along to match .*, got 'down"):
        Repairability(curves, along=("down*",)).allocate(graph, scores, sc.Budget(macs=0.4))
    with pytest.raises(SettingError, match="expected a curve of 'layer1', got only 'layer0', 'layer2'"):
        Repairability(curves).allocate(graph, scores, sc.Budget(macs=0.4))
