"""Recurrent layers, one- and three-dimensional convolutions: scored by the definition, pruned, and proven."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph.trace import trace
from secateur.signals import score
from tests.helpers.models import TOPOLOGIES, build
from tests.signals.reference import sliced_distance

LAYERS = (
    "lstm", "lstm_bidirectional", "gru", "gru_bidirectional", "lstm_last_state", "conv1d",
    "conv3d",
)  # fmt: skip


def classified(name: str, sizes: tuple[int, ...] = (8, 7)) -> list[tuple[Tensor, Tensor]]:
    """Batches in which each sample has one class, which what the network reads depends on."""
    batches = []
    for seed, size in enumerate(sizes):
        (x,) = TOPOLOGIES[name].inputs(size, torch.float64, seed)
        labels = torch.arange(size) % 3
        x = x + labels.reshape(-1, *[1] * (x.ndim - 1)) * (0.3 if x.is_floating_point() else 1)
        batches.append((x if x.is_floating_point() else x % 11, labels))
    return batches


def pooled(output: Tensor) -> Tensor:
    """Logits of a sample: the mean over its tokens, for a network that tags each. [samples, classes]"""
    return output.mean(1) if output.ndim == 3 else output


def loss_fn(run, batch) -> Tensor:
    return F.cross_entropy(pooled(run(batch[0])), batch[1])


@pytest.mark.parametrize("name", LAYERS)
def test_scored_pruned_and_proven(name: str) -> None:
    model, data = build(name), classified(name)
    graph = trace(model, data[0][0])
    scores = score(graph, data, ("wasserstein", "taylor"), loss_fn=loss_fn)
    plan = sc.ToD().allocate(graph, scores, sc.Budget(params=0.7))
    small = sc.apply(model, plan, graph=graph)
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.params <= 0.7 * plan.dense.params
    assert any(g.removed for g in plan.groups if g.name in ("recurrent", "0"))
    assert sc.verify(model, small, plan, data[0][0]).difference <= 1e-9


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_hidden_units_are_those_of_the_definition(name: str) -> None:
    """What `nn.LSTM` puts out, over time, is the map; all weights and biases of a unit's gates produce it."""
    model, data = build(name), classified(name)
    graph = trace(model, data[0][0])
    scores = score(graph, data, loss_fn=loss_fn)
    inputs, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    with torch.no_grad():
        shown = model.recurrent(model.embedding(inputs))[0]  # [samples, time, hidden]
    loss = F.cross_entropy(pooled(model(inputs)), labels)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    weights = [getattr(model.recurrent, n) for n in names]
    gradients = torch.autograd.grad(loss, weights)
    hidden, gates = model.recurrent.hidden_size, 4 if isinstance(model.recurrent, nn.LSTM) else 3
    for unit in range(hidden):
        largest = max(
            sliced_distance(shown[labels == a][:, :, unit], shown[labels == b][:, :, unit], 16, 0)
            for a, b in combinations(range(3), 2)
        )
        change = sum(
            float((w.detach()[gate * hidden + unit] * g[gate * hidden + unit]).sum())
            for w, g in zip(weights, gradients, strict=True)
            for gate in range(gates)
        )
        np.testing.assert_allclose(scores["wasserstein"]["recurrent"][unit], largest, rtol=1e-9)
        np.testing.assert_allclose(scores["taylor"]["recurrent"][unit], abs(change), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(("name", "layer"), [("conv1d", "3"), ("conv3d", "4")])
def test_maps_of_one_and_three_axes(name: str, layer: str) -> None:
    model, data = build(name), classified(name)
    graph = trace(model, data[0][0])
    scores = score(graph, data)
    inputs, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    with torch.no_grad():
        shown = nn.Sequential(*list(model)[: int(layer) + 1])(inputs).flatten(2)  # [samples, channels, map]
    conv = model[int(layer)]
    gradients = torch.autograd.grad(F.cross_entropy(model(inputs), labels), [conv.weight, conv.bias])
    for unit in range(shown.shape[1]):
        largest = max(
            sliced_distance(shown[labels == a, unit], shown[labels == b, unit], 16, 0)
            for a, b in combinations(range(3), 2)
        )
        pairs = zip((conv.weight, conv.bias), gradients, strict=True)
        change = sum(float((w.detach()[unit] * g[unit]).sum()) for w, g in pairs)
        np.testing.assert_allclose(scores["wasserstein"][layer][unit], largest, rtol=1e-9)
        np.testing.assert_allclose(scores["taylor"][layer][unit], abs(change), rtol=1e-8, atol=1e-13)


def test_a_layer_whose_last_state_alone_is_read_is_observed_there() -> None:
    model, data = build("lstm_last_state"), classified("lstm_last_state")
    graph = trace(model, data[0][0])
    (group,) = [g for g in graph.groups if any(s.tensor.endswith("weight_hh_l0") for s in g.slices)]
    scores = score(graph, data, ("wasserstein", "fisher"), loss_fn=loss_fn)
    assert (scores["fisher"][group.name] > 0).all()
    inputs, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    recurrent = next(m for m in model.modules() if isinstance(m, nn.LSTM))
    states: list[Tensor] = []
    hook = recurrent.register_forward_hook(lambda m, i, output: states.append(output[1][0]))
    model(inputs)
    hook.remove()
    for unit in range(group.size):
        shown = states[0][0, :, unit].detach()  # one number a sample
        largest = max(
            sliced_distance(shown[labels == a][:, None], shown[labels == b][:, None], 1, 0)
            for a, b in combinations(range(3), 2)
        )
        np.testing.assert_allclose(scores["wasserstein"][group.name][unit], largest, rtol=1e-9)
