"""Random small networks from a grammar of layers, random plans: always verified, in both forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.targets.units.compare import relative_difference, run
from tests.targets.units.plans import keeps, plan_of

SIDE = 4


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Branches(nn.Module):
    """Two paths over one input, concatenated along the channels."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Excite(nn.Module):
    """Channels scaled by what a bottleneck makes of their means."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Gate(nn.Module):
    """Half of the channels gates the other half."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * out, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, 1)
        return value * torch.tanh(gate)


class Attention(nn.Module):
    """Self-attention over tokens, q, k and v packed or apart, written with matmul or fused."""

    def __init__(self, width: int, heads: int, size: int, packed: bool, fused: bool) -> None:
        super().__init__()
        self.heads, self.size, self.packed, self.fused = heads, size, packed, fused
        rows = [3 * heads * size] if packed else [heads * size] * 3
        self.qkv = nn.ModuleList(nn.Linear(width, n) for n in rows)
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        if self.packed:
            q, k, v = (
                self.qkv[0](x).view(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
            )
        else:
            q, k, v = (f(x).view(batch, tokens, self.heads, self.size).transpose(1, 2) for f in self.qkv)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """Positions of a map as tokens, transformer blocks, their mean."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.flatten(2).transpose(1, 2)).mean(1)


class Pool(nn.Module):
    """The mean over space."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@st.composite
def maps(draw: st.DrawFn, channels: int, depth: int) -> tuple[nn.Module, int]:
    """A layer, or a structure of layers, on a map; and how many channels come out."""
    kinds = ["conv", "norm", "depthwise", "grouped", "gate", "excite", "prelu", "transposed"]
    kind = draw(st.sampled_from(kinds + (["residual", "branches"] if depth else [])))
    out = draw(st.integers(2, 7))
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()), out
    if kind == "norm":
        return nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.GELU()), out
    if kind == "depthwise":
        times = draw(st.integers(1, 2))
        conv = nn.Conv2d(channels, times * channels, 3, padding=1, groups=channels)
        return nn.Sequential(conv, nn.Hardswish()), times * channels
    if kind == "grouped":
        first = nn.Conv2d(channels, 2 * out, 1)
        return nn.Sequential(first, nn.Conv2d(2 * out, 4, 1, groups=2), nn.SiLU()), 4
    if kind == "gate":
        return Gate(channels, out), out
    if kind == "excite":
        return Excite(channels, out), channels
    if kind == "prelu":
        return nn.Sequential(nn.Conv2d(channels, out, 1), nn.PReLU(out), nn.AvgPool2d(3, 1, 1)), out
    if kind == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(channels, out, 3, padding=1), nn.LeakyReLU()), out
    if kind == "residual":
        inner, width = draw(maps(channels, depth - 1))
        return Residual(nn.Sequential(inner, nn.Conv2d(width, channels, 1))), channels
    (left, a), (right, b) = draw(maps(channels, depth - 1)), draw(maps(channels, depth - 1))
    return Branches(left, right), a + b


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Maps, then a head of one of three kinds."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(draw(st.integers(1, 3))):
        layer, channels = draw(maps(channels, 2))
        layers.append(layer)
    head = draw(st.sampled_from(["pool", "flatten", "tokens"]))
    if head == "pool":
        layers += [Pool(), nn.Linear(channels, 6), nn.ReLU(), nn.Linear(6, 3)]
    elif head == "flatten":
        layers += [nn.Flatten(), nn.Linear(channels * SIDE * SIDE, 6), nn.ReLU(), nn.Linear(6, 3)]
    else:
        heads, size = draw(st.integers(2, 4)), draw(st.integers(2, 5))
        attention = Attention(channels, heads, size, draw(st.booleans()), draw(st.booleans()))
        mlp = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 9), nn.GELU(), nn.Linear(9, channels))
        blocks = nn.Sequential(Residual(nn.Sequential(nn.LayerNorm(channels), attention)), Residual(mlp))
        layers += [Tokens(blocks), nn.Linear(channels, 3)]
    return nn.Sequential(*layers)


def check(data: st.DataObject, seed: int) -> None:
    """Prune a random network by a random plan; it equals the masked one at every size that may vary."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = data.draw(networks()).double().eval()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
        x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    try:
        graph = sc.trace(model, x)
    except sc.NothingToPruneError:
        return
    assert not [f for f in graph.frozen if f.reason.startswith(("no rule", "the rule"))]
    plan = plan_of(graph, data.draw(keeps(graph)))
    masked = sc.apply(model, plan, "masked")
    module = sc.apply(model, plan, graph=graph, example_inputs=x)
    assert sc.record_of(module).form == "module"
    assert sum(p.numel() for p in module.parameters()) == plan.predicted.params
    for _, sizes in [("as traced", {}), *graph.inputs.other_sizes()]:
        args, kwargs = graph.inputs.example(sizes=sizes, dtype=torch.float64, seed=1)
        expected = run(masked, args, kwargs)
        assert relative_difference(run(module, args, kwargs), expected) <= 1e-9
    if seed % 5 == 0:  # which takes longer than all the rest
        check_program(model, graph, plan, x)


def check_program(model: nn.Module, graph: sc.Graph, plan: sc.Plan, x: Tensor) -> None:
    """The captured program equals the masked model at every size that it does not refuse."""
    masked = sc.apply(model, plan, "masked")
    program = sc.apply(model, plan, "graph", graph=graph, example_inputs=x)
    assert sum(p.numel() for p in program.parameters()) == plan.predicted.params
    assert relative_difference(run(program, (x,), {}), run(masked, (x,), {})) <= 1e-9
    for _, sizes in graph.inputs.other_sizes():
        args, kwargs = graph.inputs.example(sizes=sizes, dtype=torch.float64, seed=1)
        try:
            got = run(program, args, kwargs)
        except sc.SecateurError:  # it may say that it takes no such size
            continue
        assert relative_difference(got, run(masked, args, kwargs)) <= 1e-9


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_network_any_plan(data: st.DataObject, seed: int) -> None:
    check(data, seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_a_thousand_networks(data: st.DataObject, seed: int) -> None:
    check(data, seed)
