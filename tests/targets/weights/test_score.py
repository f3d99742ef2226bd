"""Scores of single weights, against the formulas written out."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import CalibrationError, NothingToPruneError, ScoreError
from secateur.signals.weights.score import CRITERIA
from tests.targets.weights.nets import data, net, score, traced


def gradients(model: nn.Module, batches: Any) -> dict[str, Tensor]:
    """Of the mean loss over these batches, by one backward pass over all samples."""
    model = copy.deepcopy(model)
    x, y = torch.cat([a for a, _ in batches]), torch.cat([b for _, b in batches])
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_wanda_of_a_linear_layer_as_the_paper_writes_it() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 4)
    batches = [torch.randn(5, 3, 7), torch.randn(2, 3, 7)]
    found = score(layer, batches, "wanda")["wanda"]["weight"].reshape(4, 7)
    x = torch.cat([b.reshape(-1, 7) for b in batches]).double()
    for i in range(4):
        for j in range(7):
            norm = float(sum(v**2 for v in x[:, j].tolist())) ** 0.5
            expected = abs(float(layer.weight[i, j].detach())) * norm / len(x) ** 0.5
            assert found[i, j] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["conv", "grouped", "line"])
def test_wanda_of_a_convolution_sums_over_what_each_weight_multiplies(name: str) -> None:
    """The weight's share of the output's energy: run the layer with that weight alone."""
    model, batches = net(), data(2, 3)
    found = score(model, batches, "wanda")["wanda"][f"{name}.weight"]
    layer: Any = getattr(model, name)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in batches:
            model(x)
        x = torch.cat(seen)
        alone = copy.deepcopy(layer)
        alone._forward_hooks.clear()
        if alone.bias is not None:
            alone.bias.zero_()
        for k in np.random.default_rng(0).choice(len(found), 20, replace=False):
            alone.weight.zero_()
            alone.weight.view(-1)[k] = layer.weight.view(-1)[k]
            out = alone(x).movedim(1, 0).reshape(layer.out_channels, -1)
            row = int(k) // layer.weight[0].numel()
            assert found[k] == pytest.approx(float(out[row].square().mean().sqrt()), rel=1e-9)


def test_magnitude_and_taylor() -> None:
    model, batches = net(), [*data(2, 4), *data(1, 7, seed=5)]  # batches of different length
    found = score(model, batches, ["magnitude", "taylor", "snip"])
    gradient = gradients(model, batches)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            assert name not in found["taylor"]
            continue
        w = weight.detach()
        np.testing.assert_array_equal(found["magnitude"][name], w.abs().reshape(-1))
        expected = (w * gradient[name]).abs().reshape(-1)
        np.testing.assert_allclose(found["taylor"][name], expected, rtol=1e-9, atol=1e-15)
        np.testing.assert_array_equal(found["snip"][name], found["taylor"][name])


def test_fisher_is_taken_sample_by_sample() -> None:
    model, batches = net(), data(2, 3)
    found = score(model, batches, "fisher")["fisher"]
    total = {name: np.zeros(len(values)) for name, values in found.items()}
    for x, y in batches:
        for k in range(len(x)):
            for name, g in gradients(model, [(x[k : k + 1], y[k : k + 1])]).items():
                if name in total:
                    total[name] += g.square().reshape(-1).numpy()
    for name, values in found.items():
        w = dict(model.named_parameters())[name].detach().reshape(-1).numpy()
        np.testing.assert_allclose(values, w**2 * total[name] / 12, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_every_criterion_promises(criterion: str) -> None:
    model, batches = net(), data(2, 4)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.norm.train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    found = score(model, batches, criterion)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert model.conv.weight.grad is None
    assert [m.training for m in (model, model.norm, model.fc)] == [False, True, False]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert list(found[criterion]) == ["conv.weight", "grouped.weight", "line.weight", "fc.weight"]
    assert all(values.min() >= 0 for values in found[criterion].values())
    # Alone as together with all others, and however the samples are cut into batches.
    whole = [(torch.cat([a for a, _ in batches]), torch.cat([b for _, b in batches]))]
    for other in (score(model, batches, list(CRITERIA)), score(model, whole, criterion)):
        for name, values in found[criterion].items():
            np.testing.assert_allclose(other[criterion][name], values, rtol=1e-9, atol=1e-16)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(torch.tanh(self.a(self.embed(x)))))

    torch.manual_seed(0)
    model = Tied().double()
    # The two linear layers are one weight; the head's is also an embedding, and left out.
    assert [g.name for g in traced(model).groups] == ["a.weight"]
    x = torch.randint(9, (6, 5))
    found = score(model, [x], ["wanda"])["wanda"]["a.weight"].reshape(4, 4)
    first = model.embed(x)
    inputs = torch.cat([first.reshape(-1, 4), torch.tanh(model.a(first)).reshape(-1, 4)])
    expected = model.a.weight.abs() * inputs.square().mean(0).sqrt()
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-9)
    y = torch.randint(9, (6,))
    pooled = nn.Sequential(model, nn.Flatten(), nn.Linear(45, 9).double())
    taylor = score(pooled, [(x, y)], "taylor")["taylor"]["0.a.weight"]
    assert np.isfinite(taylor).all()
    assert taylor.max() > 0


def test_combinations_and_what_units_alone_have() -> None:
    model, batches = net(), data(2, 4)
    found = score(model, batches, ["magnitude+random", sc.Product("magnitude", "taylor")])
    assert set(found.signals) == {"magnitude", "random", "taylor", "magnitude+random", "magnitude*taylor"}
    for name, values in found["magnitude*taylor"].items():
        parts = [found[part][name] / found[part][name].mean() for part in ("magnitude", "taylor")]
        np.testing.assert_allclose(values, parts[0] * parts[1], rtol=1e-9)
    assert score(model, None, sc.Magnitude()).signals == ("magnitude",)
    with pytest.raises(ScoreError, match=r"for single weights, got Magnitude\(p=1"):
        score(model, None, sc.Magnitude(p=1))
    with pytest.raises(ScoreError, match="for single weights, got 'l1'"):
        score(model, None, "magnitude*l1")


def test_batches_of_ones_own() -> None:
    model, batches = net(), data(2, 4)
    named = [{"x": x} for x, _ in batches]
    found = score(model, named, "wanda", forward=lambda model, batch: model(batch["x"]))["wanda"]
    for name, values in score(model, batches, "wanda")["wanda"].items():
        np.testing.assert_array_equal(found[name], values)


def test_bad_input() -> None:
    model = net()
    with pytest.raises(ScoreError, match=r"score: expected names among magnitude, wanda, .*, got 'l3'"):
        score(model, data(), "l3")
    with pytest.raises(CalibrationError, match="expected calibration data for wanda, taylor, got none"):
        score(model, None, ["magnitude", "wanda", "taylor"])
    with pytest.raises(NothingToPruneError, match="expected a linear layer or a convolution, got none"):
        score(nn.ReLU(), None)
    with torch.no_grad():
        model.fc.weight[1, 2] = torch.nan
    with pytest.raises(ScoreError, match=r"signal magnitude, group fc\.weight: expected finite scores"):
        score(model)

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(ScoreError, match=r"expected data at every layer, got none at 'unused\.weight'"):
        score(Unused(), [torch.ones(3, 2)], "wanda")
    taylor = score(Unused(), [(torch.ones(3, 2), torch.ones(3).long())], "taylor")["taylor"]
    assert not taylor["unused.weight"].any()
