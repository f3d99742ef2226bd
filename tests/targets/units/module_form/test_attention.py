"""`PrunedAttention`: nn.MultiheadAttention to rounding; and what stands on it, pruned."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import secateur as sc
from secateur.common.models import evaluating
from secateur.measure.kernels import without_fast_path
from secateur.targets.units.module_form.attention import PrunedAttention, free_heads
from secateur.targets.units.module_form.module import smaller_module
from secateur.targets.units.tensors import removed_positions
from tests.targets.units.plans import plan_of, random_plan

Arguments = tuple[Tensor, ...]

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


@pytest.fixture(autouse=True)
def _fast_path() -> Iterator[None]:
    yield
    assert torch.backends.mha.get_fastpath_enabled(), "the fast path was turned off, and not on again"


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with biases and norms that matter."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double()


@st.composite
def calls(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, Arguments, dict[str, Any], bool]:
    """A layer, its query, key and value, the other arguments, and whether the fast path is on."""
    heads, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    width = heads * size
    batched, first = draw(st.booleans()), draw(st.booleans())
    itself = draw(st.booleans())
    own_sizes = not itself and draw(st.booleans())
    sizes = (width, *(draw(st.sampled_from([width, 5])) if own_sizes else width for _ in range(2)))
    layer = nn.MultiheadAttention(
        width, heads, draw(st.sampled_from([0.0, 0.4])), draw(st.booleans()), draw(st.booleans()),
        draw(st.booleans()), kdim=sizes[1], vdim=sizes[2], batch_first=first,
    )  # fmt: skip
    layer = randomised(layer).train(draw(st.booleans()))
    batch, length = draw(st.integers(1, 3)) if batched else 1, draw(st.integers(1, 4))
    keys = length if itself else draw(st.integers(1, 4))
    shapes = [(batch, n, e) for n, e in zip((length, keys, keys), sizes, strict=True)]
    q, k, v = (torch.randn(s, dtype=torch.float64) for s in shapes)
    if not batched:
        q, k, v = q[0], k[0], v[0]
    elif not first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    inputs = (q, q, q) if itself else (q, k, k) if sizes[1] == sizes[2] and draw(st.booleans()) else (q, k, v)
    causal = draw(st.booleans())
    given: dict[str, Any] = {
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
        "is_causal": causal,
    }
    as_numbers = draw(st.booleans())
    if causal or draw(st.booleans()):
        per_head = not causal and draw(st.booleans())
        shape = (batch * heads, length, keys) if per_head else (length, keys)
        mask = torch.ones(length, keys).triu(1).bool() if causal else torch.rand(shape) < 0.4
        mask[..., 0] = False  # no query may be left without a key: torch's own kernels differ there
        given["attn_mask"] = torch.randn(shape).double().masked_fill(mask, -torch.inf) if as_numbers else mask
        if causal and as_numbers:
            given["attn_mask"] = torch.zeros(shape).double().masked_fill(mask, -torch.inf)
    if draw(st.booleans()):
        padding = torch.rand((batch, keys) if batched else (keys,)) < 0.4
        padding[..., 0] = False
        given["key_padding_mask"] = (
            torch.zeros(padding.shape).double().masked_fill(padding, -3) if as_numbers else padding
        )
    return layer, inputs, given, draw(st.booleans())


def result(layer: nn.Module, inputs: Arguments, given: dict[str, Any], fast: bool) -> list[Tensor | None]:
    """Output and weights; and, where the fast path is off, the gradients of all parameters."""
    torch.manual_seed(1)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.set_grad_enabled(not fast):
            output, weights = layer(*inputs, **given)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    if fast:
        return [output, weights]
    return [output, weights, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]


@settings(max_examples=200, deadline=None)
@given(calls())
def test_it_is_multihead_attention_where_nothing_is_removed(call: Any) -> None:
    layer, inputs, given_, fast = call
    ours = copy.deepcopy(layer)
    free_heads(ours)
    assert type(ours) is PrunedAttention
    for wanted, got in zip(
        result(layer, inputs, given_, fast), result(ours, inputs, given_, fast), strict=True
    ):
        assert (wanted is None) == (got is None)
        if wanted is not None and got is not None:
            assert wanted.shape == got.shape
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


class Bare(nn.Module):
    """One attention whose weights nobody reads, inside a residual connection."""

    def __init__(self, attention: nn.MultiheadAttention, width: int = 16) -> None:
        super().__init__()
        self.attention = attention
        self.head = nn.Linear(width, 3)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return self.head(query + self.attention(query, memory, memory, need_weights=False)[0])


class Alone(Bare):
    """The same with one input, passed on by a class of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x))


class Sequence(nn.Module):
    """Tokens, of which those of number 0 are padding, through an encoder; pooled over all positions."""

    def __init__(self, encoder: nn.Module, *, batch_first: bool = True, padding: bool = True) -> None:
        super().__init__()
        self.embedding, self.encoder, self.head = nn.Embedding(20, 16), encoder, nn.Linear(16, 3)
        self.batch_first, self.padding = batch_first, padding

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=ids == 0) if self.padding else self.encoder(x)
        return self.head(x.mean(1 if self.batch_first else 0))


class Translator(nn.Module):
    """`nn.Transformer` with a causal target and a padded source."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.transformer = nn.Transformer(16, 4, 1, 2, 24, dropout=0.0, batch_first=True, **options)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        padding = source == 0
        return self.head(self.transformer(
            self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        ))  # fmt: skip


class Causal(nn.Module):
    """A causal mask for each head, made with the layer's own number of heads, in the order length first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, dropout=0.0), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mask = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)[None]
        mask = mask.repeat(x.shape[1] * self.attention.num_heads, 1, 1)
        return self.head(x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])


class OneInput(nn.MultiheadAttention):
    """A user's own class that calls PyTorch's forward."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]

    def heads_and_size(self) -> tuple[int, int]:
        return self.num_heads, self.head_dim


class Direct(nn.MultiheadAttention):
    """A user's own class that calls PyTorch's function."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            x, x, x, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, None, None,
            False, 0.0, self.out_proj.weight, self.out_proj.bias, training=self.training, need_weights=False,
        )  # fmt: skip
        return out.transpose(0, 1)


class Named(nn.MultiheadAttention):
    """A user's own class that calls the forward of PyTorch's by name."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return nn.MultiheadAttention.forward(self, x, x, x, need_weights=False)[0]


class ByHand(nn.MultiheadAttention):
    """A user's own class that computes everything itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        batch, length, width = x.shape
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (t.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for t in projected)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out_proj(heads.reshape(batch, length, width))


class Pool(nn.Module):
    """Pools a sequence by attention with projections that are layers of their own, as CLIP's ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x])
        return F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=4,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0, out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias, use_separate_proj_weight=True, need_weights=False,
        )[0][0]  # fmt: skip


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, **({"batch_first": True} | options))


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoder(layer(**options), 2, enable_nested_tensor=options.get("batch_first", True))


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(16, 4, **({"batch_first": True} | options))


def tokens(batch: int, length: int, padded: int = 2) -> Tensor:
    """Numbers of tokens; the k-th row ends with k + `padded` zeros."""
    ids = torch.randint(1, 20, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    for k in range(batch):
        ids[k, length - k % 3 - padded :] = 0
    return ids


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


Inputs = Callable[[int, int], Arguments]
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "cross": (lambda: Bare(attention()), lambda n, s: (floats(n, s, 16), floats(n, s + 2, 16))),
    "sizes of their own": (
        lambda: Bare(attention(kdim=6, vdim=6)),
        lambda n, s: (floats(n, s, 16), floats(n, s + 2, 6)),
    ),
    "without bias": (lambda: Bare(attention(bias=False)), lambda n, s: (floats(n, s, 16), floats(n, 3, 16))),
    "added positions": (
        lambda: Bare(attention(add_bias_kv=True, add_zero_attn=True)),
        lambda n, s: (floats(n, s, 16), floats(n, 3, 16)),
    ),
    "a user's class": (lambda: Alone(OneInput(16, 4, batch_first=True)), lambda n, s: (floats(n, s, 16),)),
    "a class that calls the function": (
        lambda: Alone(Direct(16, 4, batch_first=True)),
        lambda n, s: (floats(n, s, 16),),
    ),
    "a class that names the forward": (
        lambda: Alone(Named(16, 4, batch_first=True)),
        lambda n, s: (floats(n, s, 16),),
    ),
    "a class that computes itself": (
        lambda: Alone(ByHand(16, 4, batch_first=True)),
        lambda n, s: (floats(n, s, 16),),
    ),
    "pooling": (Pool, lambda n, s: (floats(n, s, 16),)),
    "a mask for each head": (Causal, lambda n, s: (floats(n, s, 16),)),
    "encoder": (lambda: Sequence(encoder()), lambda n, s: (tokens(n, s),)),
    "encoder, norm first": (
        lambda: Sequence(nn.TransformerEncoder(layer(norm_first=True), 2, enable_nested_tensor=False)),
        lambda n, s: (tokens(n, s),),
    ),
    "encoder, gelu": (lambda: Sequence(encoder(activation="gelu")), lambda n, s: (tokens(n, s),)),
    "encoder, length first": (
        lambda: Sequence(encoder(batch_first=False), batch_first=False),
        lambda n, s: (tokens(n, s),),
    ),
    "encoder without padding": (lambda: Sequence(encoder(), padding=False), lambda n, s: (tokens(n, s),)),
    "one encoder layer": (lambda: Sequence(layer(), padding=False), lambda n, s: (tokens(n, s),)),
    "transformer": (Translator, lambda n, s: (tokens(n, s), tokens(n, s - 2, 0))),
}  # fmt: skip
"""Models with heads, and what gives them inputs of a batch size and a length."""

SMALLER = ", smaller heads"
"""The end of the names of models whose heads lose channels, and do not go as a whole."""
MODELS |= {
    name + SMALLER: MODELS[name]
    for name in ("cross", "sizes of their own", "added positions", "a user's class",
                 "a class that computes itself", "a mask for each head", "encoder", "transformer")
}  # fmt: skip

SOME = (
    "cross", "added positions", "a class that calls the function", "a mask for each head", "encoder",
    "sizes of their own" + SMALLER, "added positions" + SMALLER,
)  # fmt: skip


def attentions(model: nn.Module) -> list[nn.MultiheadAttention]:
    return [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]


@pytest.fixture(params=MODELS)
def pruned(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, nn.Module, sc.Plan, Inputs]:
    """Dense, masked and pruned model, the plan, and inputs."""
    return prune(request.param)


def prune(name: str) -> tuple[nn.Module, nn.Module, nn.Module, sc.Plan, Inputs]:
    model, plan, small = applied(name)
    small = copy.deepcopy(small)
    assert all(type(m) is not nn.MultiheadAttention for m in attentions(small))
    return model, sc.apply(model, plan, "masked"), small, plan, MODELS[name][1]


@functools.cache
def traced(name: str) -> tuple[nn.Module, sc.Graph]:
    make, inputs = MODELS[name]
    model = randomised(make()).eval()
    granularity = "head_size" if name.endswith(SMALLER) else "unit"
    return model, sc.trace(model, inputs(4, 7), granularity=granularity)


@functools.cache
def applied(name: str) -> tuple[nn.Module, sc.Plan, nn.Module]:
    (model, graph), inputs = traced(name), MODELS[name][1]
    plan = random_plan(graph, 0.3)
    if name.startswith("sizes of their own") and name.endswith(SMALLER):  # of values another size
        plan = plan_of(graph, {g.name: np.arange(g.size) > k for k, g in enumerate(graph.groups)})
    small = sc.apply(model, plan, "module", graph=graph, example_inputs=inputs(4, 7))
    assert bool(sc.record_of(small).note) == (name.startswith("a class that") or name == "pooling")
    return model, plan, small


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_pruned_equals_masked_at_other_sizes(pruned: Any, fast: bool, training: bool) -> None:
    _, masked, small, _, inputs = pruned
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        for batch, length in ((4, 7), (1, 5), (3, 12)):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    got, wanted = (m.train(training)(*inputs(batch, length)) for m in (small, masked))
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_every_head_that_is_left_matters(pruned: Any) -> None:
    _, _, small, _, inputs = pruned
    before = small(*inputs(4, 7))
    for module in attentions(small):
        for head in range(module.num_heads):
            spoilt = copy.deepcopy(small)
            twin = attentions(spoilt)[attentions(small).index(module)]
            with torch.no_grad():
                column = twin.out_proj.weight[:, head * module.v_head_dim]
                column += torch.linspace(-1, 1, len(column))
            assert not torch.allclose(spoilt(*inputs(4, 7)), before), head


def test_verify_and_loading_take_it(pruned: Any, tmp_path: Any) -> None:
    model, _, small, plan, inputs = pruned
    sc.verify(model, small, plan, inputs(4, 7))
    assert set(small.state_dict()) == set(model.state_dict())
    sc.save(small, tmp_path / "artefact")
    loaded = sc.load(tmp_path / "artefact", lambda: copy.deepcopy(model))
    for again in (loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]
        assert torch.equal(again(*inputs(3, 9)), small(*inputs(3, 9)))


@pytest.mark.parametrize("name", SOME)
def test_it_is_captured_with_open_axes(name: str) -> None:
    _, _, small, _, inputs = prune(name)
    auto = torch.export.Dim.AUTO
    shapes = tuple({0: auto, 1: auto} for _ in inputs(4, 7))
    program = torch.export.export(small, inputs(4, 7), dynamic_shapes=shapes).module()
    for batch, length in ((4, 7), (3, 12)):
        given_ = inputs(batch, length)
        torch.testing.assert_close(program(*given_), small(*given_), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_it_is_pruned_again(name: str) -> None:
    _, _, small, _, inputs = prune(name)
    graph = sc.trace(small, inputs(4, 7))
    assert {m.num_heads for m in attentions(small)} <= {group.size for group in graph.groups}
    plan = random_plan(graph, 0.3, seed=1)
    again = sc.apply(small, plan, "module", graph=graph, example_inputs=inputs(4, 7))
    masked = sc.apply(small, plan, "masked")
    assert [m.num_heads for m in attentions(again)] == [m.num_heads - 1 for m in attentions(small)]
    for sizes in ((4, 7), (2, 9)):
        torch.testing.assert_close(again(*inputs(*sizes)), masked(*inputs(*sizes)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cross", "encoder", "sizes of their own" + SMALLER])
@pytest.mark.filterwarnings("ignore")  # of the exporter, about its own code
def test_onnx_runtime_takes_it_at_any_length(name: str, tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, _, small, _, inputs = prune(name)
    small.float().eval()

    def cast(*sizes: int) -> Arguments:
        return tuple(t.float() if t.is_floating_point() else t for t in inputs(*sizes))

    auto = torch.export.Dim.DYNAMIC
    shapes = tuple({0: auto, 1: auto} for _ in inputs(4, 7))
    torch.onnx.export(
        small, cast(4, 7), tmp_path / "small.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    for sizes in ((4, 7), (3, 12)):
        names = [each.name for each in session.get_inputs()]
        got = session.run(None, dict(zip(names, (t.numpy() for t in cast(*sizes)), strict=True)))[0]
        with without_fast_path():
            np.testing.assert_allclose(got, small(*cast(*sizes)).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cross", "encoder", "transformer", "sizes of their own" + SMALLER])
def test_it_compiles_for_any_length(name: str) -> None:
    _, _, small, _, inputs = prune(name)
    compiled = torch.compile(small, backend="eager", dynamic=True, fullgraph=True)
    for sizes in ((4, 7), (3, 12)):
        torch.testing.assert_close(compiled(*inputs(*sizes)), small(*inputs(*sizes)), rtol=1e-9, atol=1e-12)
    torch.compiler.reset()


def test_an_encoder_returns_zeros_where_the_dense_one_does() -> None:
    make = lambda: nn.TransformerEncoder(layer(), 2)  # noqa: E731
    model = randomised(Sequence(make())).eval()
    ids = tokens(4, 7)
    graph = sc.trace(model, ids)
    plan = random_plan(graph, 0.3)
    small, masked = (
        sc.apply(model, plan, form, graph=graph, example_inputs=ids) for form in ("module", "masked")
    )
    seen = []
    for each in (small, masked):
        with torch.no_grad():
            seen.append(each.encoder(each.embedding(ids), src_key_padding_mask=ids == 0))
    assert (seen[0][ids == 0] == 0).all()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-9, atol=1e-12)
    trained = small.encoder(
        small.embedding(ids), src_key_padding_mask=ids == 0
    )  # with gradients no zeros, as in torch
    assert (trained[ids == 0] != 0).all()


def test_the_captured_program_says_that_it_returns_no_zeros() -> None:
    model, _, _, plan, inputs = prune("encoder")
    program = sc.apply(model, plan, "graph", graph=traced("encoder")[1])
    assert "nn.TransformerEncoder in evaluation mode may return zeros" in sc.record_of(program).note
    with without_fast_path(), torch.no_grad():
        torch.testing.assert_close(program(*inputs(4, 7)), sc.apply(model, plan, "masked")(*inputs(4, 7)))
    model, _, _, plan, inputs = prune("cross")
    assert sc.record_of(sc.apply(model, plan, "graph", graph=traced("cross")[1])).note == ""


def test_hooks_see_layers_of_an_encoder_with_padding() -> None:
    model, _, _, _, inputs = prune("encoder")
    seen: list[Tensor] = []
    hook = model.encoder.layers[0].linear1.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].square())
    )
    with evaluating(model), torch.no_grad():
        assert not torch.backends.mha.get_fastpath_enabled()
        model(*inputs(4, 7))
    hook.remove()
    assert seen[0].shape == (4, 7, 16)
    with evaluating(model, fast_path=True):
        assert torch.backends.mha.get_fastpath_enabled()


def test_symbolic_tracing_takes_it_as_one_call() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = prune("cross")[2].attention, nn.Linear(16, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0])

    net, x = Net(), floats(2, 5, 16)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_attributes_say_what_is_left() -> None:
    model, _, small, _, _ = prune("a user's class")
    found = small.attention
    assert isinstance(found, OneInput)
    assert found.heads_and_size() == (3, 4)
    assert (found.embed_dim, found.kdim, found.vdim, found.out_proj.in_features) == (16, 16, 16, 12)
    assert repr(small.attention).startswith("OneInput(\n  num_heads=3, head_dim=4")
    assert type(model.attention) is OneInput
    found = prune("sizes of their own" + SMALLER)[2].attention
    assert (found.num_heads, found.head_dim, found.v_head_dim, found.head_scale) == (4, 3, 2, 0.5)
    assert repr(found).startswith("PrunedAttention(\n  num_heads=4, head_dim=3, v_head_dim=2")


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_computed_weights_can_be_made_plain_again() -> None:
    model = randomised(Alone(OneInput(16, 4, batch_first=True))).eval()
    parametrize.register_parametrization(model.attention, "in_proj_weight", Doubled())
    x = floats(2, 5, 16)
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.3)
    small = sc.apply(model, plan, "module", graph=graph, example_inputs=x)
    wanted = sc.apply(model, plan, "masked")(x)
    torch.testing.assert_close(small(x), wanted)
    torch.testing.assert_close(copy.deepcopy(small)(x), wanted)
    parametrize.remove_parametrizations(small.attention, "in_proj_weight")
    assert isinstance(small.attention, OneInput)
    assert isinstance(small.attention, PrunedAttention)
    assert small.attention.in_proj_weight.shape == (36, 16)
    torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), wanted)


def test_an_output_narrower_than_the_input() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = attention(), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model, x = randomised(Net()).eval(), floats(2, 5, 16)
    graph = sc.trace(model, x)
    (group,) = (g for g in graph.groups if g.size == 16)
    plan = plan_of(graph, {group.name: np.arange(16) >= 5})
    small = sc.apply(model, plan, "module", graph=graph, example_inputs=x)
    assert small.attention.out_proj.weight.shape == (11, 16)
    for given_ in (x, floats(3, 8, 16)):
        for each in (torch.no_grad, torch.enable_grad):
            with each():
                torch.testing.assert_close(small(given_), sc.apply(model, plan, "masked")(given_))


@pytest.mark.parametrize("name", ["encoder", pytest.param("transformer", marks=pytest.mark.slow)])
def test_narrower_streams(name: str) -> None:
    make, inputs = MODELS[name]
    model = randomised(make()).eval()
    graph = sc.trace(model, inputs(4, 7), allow_inexact=True)
    plan = random_plan(graph, 0.3)
    small = sc.apply(model, plan, "module", graph=graph, example_inputs=inputs(4, 7))
    assert {(m.embed_dim, m.num_heads, m.head_dim) for m in attentions(small)} == {(12, 3, 4)}
    program = sc.apply(model, plan, "graph", graph=graph)
    torch.testing.assert_close(small(*inputs(4, 7)), program(*inputs(4, 7)), rtol=1e-9, atol=1e-12)


def test_parts_of_heads_are_refused() -> None:
    model, _, _, plan, _ = prune("cross")
    removed = removed_positions(plan)["attention.out_proj.weight"][1]
    assert len(removed) == 4
    group = next(g for g in plan.groups if any(s.tensor == "attention.out_proj.weight" for s in g.slices))
    slices = tuple(
        type(s)(**{**vars(s), "removed": tuple(p + 1 for p in s.removed)}) for s in group.slices
    )  # one channel further: the last three of one head and the first of the next
    shifted = copy.copy(plan)
    object.__setattr__(shifted, "groups", (type(group)(**{**vars(group), "slices": slices}),))
    with pytest.raises(
        sc.ApplyError, match="expected MultiheadAttention to keep the same heads of queries, keys and"
    ):
        smaller_module(model, shifted)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (
            {"attn_mask": torch.zeros(16, 5, 5, dtype=torch.bool)},
            r"\[batch · heads, 5, 5\] with 2 · 3, got \[16, 5, 5\]",
        ),
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, r"key_padding_mask of shape \[2, 5\]"),
        ({"is_causal": True}, "expected attn_mask with is_causal=True"),
    ],
)
def test_wrong_masks_are_refused(given_: dict[str, Any], message: str) -> None:
    small = prune("cross")[2].attention
    x = floats(2, 5, 16)
    with pytest.raises(ValueError, match=message):
        small(x, x, x, **given_)


def test_keys_without_values_are_refused() -> None:
    small = prune("cross")[2].attention
    x = floats(2, 5, 16)
    for wrong in ((x, x, x[:, :4]), (x, x[:, :4], x), (x[:1], x, x)):
        with pytest.raises(ValueError, match="keys and values of one length, and one batch size"):
            small(*wrong)


def test_nested_tensors_that_it_cannot_take_are_refused() -> None:
    small = prune("cross")[2].attention
    x = torch.nested.as_nested_tensor([floats(3, 16), floats(5, 16)])
    got = small(x, x, x, need_weights=False)[0].unbind()
    for one, alone in zip(x.unbind(), got, strict=True):
        torch.testing.assert_close(small(one[None], one[None], one[None])[0][0], alone)
    with pytest.raises(ValueError, match="need_weights=False"):
        small(x, x, x)
    with pytest.raises(ValueError, match="and no mask"):
        small(x, x, x, attn_mask=torch.zeros(5, 5), need_weights=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["encoder", "encoder" + SMALLER])
def test_half_precision_and_autocast(name: str, dtype: torch.dtype) -> None:
    _, masked, small, _, inputs = prune(name)
    with torch.no_grad():
        got, wanted = (copy.deepcopy(m).to(dtype)(*inputs(3, 8)).float() for m in (small, masked))
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.1)
        with torch.autocast("cpu", dtype), without_fast_path():
            got, wanted = (m.float()(*inputs(3, 8)) for m in (small, masked))
            torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.1)
