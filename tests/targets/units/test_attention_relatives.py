"""`nn.MultiheadAttention` in all its ways stays a module, whatever its sizes and whatever goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc

Inputs = Callable[[int, int], tuple[Tensor, ...]]
Weights = Literal["not made", "not read", "returned"]


class Attending(nn.Module):
    """An attention between two layers. Without keys it attends to its own input."""

    def __init__(self, attention: nn.MultiheadAttention, weights: Weights) -> None:
        super().__init__()
        self.attention, self.weights = attention, weights
        self.query, self.head = nn.Linear(6, attention.embed_dim), nn.Linear(attention.embed_dim, 5)

    def forward(self, x: Tensor, *memory: Tensor) -> Any:
        x = self.query(x)
        tensors = [x, *(memory or (x, x))]
        if not self.attention.batch_first:
            tensors = [t.transpose(0, 1) for t in tensors]
        y, weights = self.attention(*tensors, need_weights=self.weights != "not made")
        y = self.head(y if self.attention.batch_first else y.transpose(0, 1))
        return (y, weights) if self.weights == "returned" else y


class Decoding(nn.Module):
    """A decoder layer."""

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(width, heads, 12, dropout=0.0, batch_first=True, **options)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.layer(x, memory))


class Nested(nn.Module):
    """A model inside a user's own, whose first output is read on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks, self.end = nn.ModuleList([nn.Identity(), inner]), nn.LazyLinear(4)

    def forward(self, *inputs: Tensor) -> Tensor:
        y = self.blocks[1](*inputs)
        return self.end(torch.relu(y[0] if isinstance(y, tuple) else y))


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Inputs, int, int]:
    """A model, what makes its inputs of a batch size and a length, and its heads: how many, of which size."""
    heads, size = draw(st.integers(2, 5)), draw(st.sampled_from([2, 4, 8, 16]))
    width = heads * size
    kind = draw(st.sampled_from(["self", "cross", "sizes of their own", "decoder"]))
    biased = draw(st.booleans())
    if kind == "decoder":
        options = {"bias": biased, "norm_first": draw(st.booleans())}
        model: nn.Module = Decoding(width, heads, **options)
        inputs: Inputs = lambda n, s: (floats(n, s, width), floats(n, s + 2, width))  # noqa: E731
    else:
        sizes = {"kdim": 10, "vdim": 14} if kind == "sizes of their own" else {}
        keys = [*sizes.values()] or [width, width]
        added = {"add_bias_kv": draw(st.booleans()), "add_zero_attn": draw(st.booleans())}
        first = draw(st.booleans())
        attention = nn.MultiheadAttention(width, heads, bias=biased, batch_first=first, **added, **sizes)
        model = Attending(attention, draw(st.sampled_from(["not made", "not read", "returned"])))
        memory = kind != "self"
        inputs = lambda n, s: (floats(n, s, 6), *(floats(n, s + 2, k) for k in keys if memory))  # noqa: E731
    torch.manual_seed(0)
    model = (Nested(model) if draw(st.booleans()) else model).double().eval()
    model(*inputs(2, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, inputs, heads, size


def attentions(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}


def returns_weights(model: nn.Module) -> bool:
    """Whether the average over heads is an output, so that all heads have to stay."""
    return isinstance(model, Attending) and model.weights == "returned"


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    models(),
    st.sampled_from(["unit", "head_size"]),
    st.sampled_from(["magnitude", "random"]),
    st.sampled_from([0.3, 0.5, 0.7]),
    st.integers(2, 4),
)
def test_the_module_is_right(
    drawn: Any, granularity: Literal["unit", "head_size"], removal: str, ratio: float, batch: int
) -> None:
    check(drawn, granularity, removal, ratio, batch)


@settings(max_examples=8, deadline=None)
@given(models(), st.sampled_from(["unit", "head_size"]), st.integers(2, 4))
def test_the_module_is_right_at_half(
    drawn: Any, granularity: Literal["unit", "head_size"], batch: int
) -> None:
    check(drawn, granularity, "magnitude", 0.5, batch)


def check(drawn: Any, granularity: Any, removal: str, ratio: float, batch: int) -> None:
    """Prune the model and compare it with the masked one: in form module, at all sizes, in training mode."""
    model, inputs, heads, size = drawn
    graph = sc.trace(model, inputs(batch, 5), granularity=granularity)
    scores = sc.score(graph, None, signals=(removal,))
    plan = sc.Uniform(ratio=ratio, removal=removal).allocate(graph, scores)
    small = sc.apply(model, plan, graph=graph, example_inputs=inputs(batch, 5))
    assert sc.record_of(small).form == "module"
    sc.verify(model, small, plan, inputs(batch, 5))
    assert [*small.state_dict()] == [*model.state_dict()]
    for layer in attentions(small).values():
        gone = int(ratio * heads), int(ratio * size)
        if granularity == "head_size":
            assert (layer.num_heads, layer.head_dim) == (heads, size - gone[1])
        elif not returns_weights(model):
            assert (layer.num_heads, layer.head_dim) == (heads - gone[0], size)
    masked = sc.apply(model, plan, "masked")
    for training in (False, True):
        for sizes in ((batch, 5), (1, 3), (5, 4)):
            got, wanted = (m.train(training)(*inputs(*sizes)) for m in (small, masked))
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_heads_are_found_at_any_batch_size(batch: int, size: int) -> None:
    """Samples and heads become one axis, which can be longer or shorter than a head, or just as long."""
    attention = nn.MultiheadAttention(4 * size, 4, kdim=10, vdim=14, batch_first=True)
    inputs = (torch.randn(batch, 5, 6), torch.randn(batch, 7, 10), torch.randn(batch, 7, 14))
    model = Attending(attention, "not made").eval()
    assert {g.name: g.size for g in sc.trace(model, inputs).groups}["attention"] == 4
    dimensions = sc.trace(model, inputs, granularity="head_size")
    assert {g.name: g.size for g in dimensions.groups} == {"attention": size, "attention#2": size}


def test_values_alone_become_smaller_where_heads_are_returned() -> None:
    """Every head is in the weights that the model returns, so channels of values are left to go."""
    attention = nn.MultiheadAttention(32, 4, kdim=10, vdim=14, batch_first=True)
    model = Attending(attention, "returned").eval()
    inputs = (torch.randn(2, 5, 6), torch.randn(2, 7, 10), torch.randn(2, 7, 14))
    graph = sc.trace(model, inputs)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, signals=("magnitude",)))
    small = sc.apply(model, plan, graph=graph, example_inputs=inputs)
    assert sc.record_of(small).form == "module"
    layer = small.attention
    assert (layer.num_heads, layer.head_dim, layer.v_head_dim) == (4, 8, 6)
    sc.verify(model, small, plan, inputs)
