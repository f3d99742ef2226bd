"""What a forward pass keeps is not captured, and what stops a capture is said by the user's own line."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

import secateur as sc
from secateur.common.outputs import tensors_of
from secateur.graph.capture import Capture, capture
from tests.graph.tiny import Calls


def captured(net: nn.Module, *inputs: Tensor) -> Capture:
    return capture(net.eval(), inputs, {})


def answer(found: Capture, *inputs: Tensor) -> Any:
    return found.program.module()(*inputs)


@functools.lru_cache
def row(length: int) -> Tensor:
    return torch.arange(length).float()


class Kept(nn.Module):
    """A network that adds a table, which `table` keeps in one way or another."""

    def __init__(self, table: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.table = nn.Linear(6, 8), nn.Linear(8, 3), table
        self.register_buffer("held", None, persistent=False)
        self.cache: Any = None
        self.tables: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + self.table(self, x))


def once(net: Any, x: Tensor) -> Tensor:
    if net.cache is None:
        net.cache = torch.arange(8.0)
    return net.cache


def for_this_batch(net: Any, x: Tensor) -> Tensor:
    if net.cache is None or net.cache.shape[0] != x.shape[0]:
        net.cache = torch.arange(x.shape[0]).float()[:, None]
    return net.cache


def in_a_buffer(net: Any, x: Tensor) -> Tensor:
    if net.held is None or net.held.shape[0] != x.shape[0]:
        net.register_buffer("held", torch.arange(x.shape[0]).float()[:, None], persistent=False)
    return net.held


def in_an_object(net: Any, x: Tensor) -> Tensor:
    if net.cache is None or net.cache.table.shape[0] != x.shape[0]:
        net.cache = SimpleNamespace(table=torch.arange(x.shape[0]).float()[:, None])
    return net.cache.table


def in_a_dictionary(net: Any, x: Tensor) -> Tensor:
    if x.dtype not in net.tables or net.tables[x.dtype].shape[0] != x.shape[0]:
        net.tables[x.dtype] = torch.arange(x.shape[0]).float()[:, None]
    return net.tables[x.dtype]


def in_a_cached_function(net: Any, x: Tensor) -> Tensor:
    return row(x.shape[1] + 2)


TABLES = [once, for_this_batch, in_a_buffer, in_an_object, in_a_dictionary, in_a_cached_function]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.__name__)
def test_what_a_forward_pass_keeps_does_not_fix_the_batch(table: Any, used: bool) -> None:
    row.cache_clear()
    net = Kept(table).eval()
    x, other = torch.randn(4, 6), torch.randn(7, 6)
    if used:
        net(x)
    kept = copy.deepcopy((net.cache, net.held, net.tables))
    found = captured(net, x)
    assert found.static is None
    assert str(copy.deepcopy((net.cache, net.held, net.tables))) == str(kept)
    for arguments in (x, other):
        assert torch.allclose(answer(found, arguments), net(arguments))
    assert not isinstance(row(8), FakeTensor)


def test_a_key_that_no_capture_has_fixes_the_batch_and_is_named() -> None:
    net = Calls(lambda m, x: m.a(x) + row(x.shape[0])[:, None], a=nn.Linear(6, 3))
    found = captured(net, torch.randn(4, 6))
    assert found.static == 4
    assert found.why.startswith("test_capture.py:")
    assert "key of a dictionary or of a cached function" in found.why


def test_a_first_pass_that_no_capture_can_hold_is_left_behind() -> None:
    """Tables made from values, as detectors make anchors from strides, are taken from the ordinary pass."""

    def table(net: Any, x: Tensor) -> Tensor:
        if net.cache is None:
            net.cache = torch.full((8,), float(torch.ones(3).sum()))
        return net.cache

    net = Kept(table).eval()
    found = captured(net, torch.randn(4, 6))
    assert found.static is None
    assert net.cache is None
    x = torch.randn(7, 6)
    assert torch.allclose(answer(found, x), net(x))


def test_the_program_holds_the_tensors_of_the_model() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = captured(net, torch.randn(2, 3))
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    assert all(found.program.state_dict[name] is tensor for name, tensor in own.items())


def test_inputs_carry_no_marks_of_a_capture() -> None:
    net, x = nn.Linear(3, 4), torch.randn(2, 3)
    before = set(vars(x))
    captured(net, x)
    assert set(vars(x)) == before


def test_the_random_state_is_left_alone() -> None:
    net = Calls(lambda m, x: m.a(x) + torch.rand(3), a=nn.Linear(3, 3))
    before = torch.get_rng_state()
    captured(net, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())


# What is returned


@dataclasses.dataclass
class Answer:
    logits: Tensor
    name: str = "x"


@dataclasses.dataclass(slots=True)
class Slots:
    logits: Tensor


class Entries(dict):  # type: ignore[type-arg]
    pass


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.inner, self.dtype = logits, Slots(logits + 1), logits.dtype


RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Answer,
    "slots": Slots,
    "dictionary of a class": lambda y: Entries(logits=y, n=3),
    "object in a list": lambda y: [Plain(y), "text"],
    "distribution": lambda y: torch.distributions.Normal(y, y.exp()),
    "transformed distribution": lambda y: torch.distributions.Independent(
        torch.distributions.Normal(y, 1.0), 1
    ),
    "what is no tensor": lambda y: (y, torch.float32, {"a"}, slice(1, 2), 1j, b"x", abs, range(3)),
}


@pytest.mark.parametrize("name", RETURNED)
def test_whatever_holds_tensors_may_be_returned(name: str) -> None:
    net = Calls(lambda m, x: RETURNED[name](m.b(m.a(x))), a=nn.Linear(3, 8), b=nn.Linear(8, 2)).eval()
    x = torch.randn(5, 3)
    found = captured(net, torch.randn(4, 3))
    got, wanted = answer(found, x), net(x)
    assert type(got) is type(wanted)
    assert tensors_of(wanted)
    for a, b in zip(tensors_of(got), tensors_of(wanted), strict=True):
        assert torch.allclose(a, b)
    assert any(graph.size == 8 for graph in sc.trace(net, x).groups)
    constants = [v for v in pytree.tree_leaves(wanted) if not isinstance(v, Tensor)]
    assert name != "what is no tensor" or got[1:] == wanted[1:] == tuple(constants)


# What stops it


def layer() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 1)


WORKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "assertion": lambda m, x: checked(m.a(x)),
    "causal mask": lambda m, x: m.layer(
        m.a(x)[None], mask=nn.Transformer.generate_square_subsequent_mask(len(x))
    ),
    "own stream": lambda m, x: m.a(x) + 0 * torch.randn(4, 6, generator=m.stream),
    "compiled": lambda m, x: torch.compile(lambda y: y + 1)(m.a(x)),
    "checkpoint": lambda m, x: torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False),
}


def checked(x: Tensor) -> Tensor:
    assert not x.isnan().any(), "not a number"
    assert (x.abs() < 1e9).all() and x.isfinite().all()  # noqa: PT018 what people write
    if not (x * x >= 0).all():
        raise ValueError("negative")
    if x.isinf().any() or (x.abs() > 1e30).any():
        print("large")
    return x + 1


@pytest.mark.parametrize("name", WORKS)
def test_what_does_not_change_the_result_does_not_stop_a_capture(name: str) -> None:
    net = Calls(WORKS[name], a=nn.Linear(6, 6), layer=layer()).eval()
    net.stream = torch.Generator()
    x = torch.randn(4, 6)
    found = answer(captured(net, x), x)
    with torch.no_grad():  # where it compiles anew for gradients, PyTorch warns
        assert torch.allclose(found, net(x), atol=1e-6)


def test_assertions_fail_in_the_ordinary_pass() -> None:
    net = Calls(lambda m, x: checked(m.a(x) / 0), a=nn.Linear(3, 3))
    with pytest.raises(sc.CaptureError, match=r"to run, got test_capture.py:\d+: assert .*AssertionError"):
        captured(net, torch.zeros(2, 3))


def loop(net: Any, x: Tensor) -> Tensor:
    while x.sum() > 0:
        x = x - 1
    return x


def either(net: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        raise ValueError
    else:
        x = x + 1
    return x


def packed(net: Any, x: Tensor) -> Tensor:
    sequences = rnn.pack_padded_sequence(x[None], torch.tensor([3]), batch_first=True)
    return rnn.pad_packed_sequence(net.lstm(sequences)[0], batch_first=True)[0]


STOPS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "loop": (loop, "while x.sum.*depends on the values of a tensor.*torch.where"),
    "either": (either, "if x.sum.*depends on the values of a tensor"),
    "number": (lambda m, x: x[: int(x.abs().sum())], "depends on the values of a tensor"),
    "NumPy": (lambda m, x: torch.from_numpy(x.numpy() + 1), "values leave PyTorch there"),
    "format": (lambda m, x: x if f"{x.mean().item():.2f}" else -x, "depends on the values"),
    "packed": (
        packed,
        "packed by lengths.*Pass the lengths as a tensor of integers, or prune the parts before",
    ),
    "one hot": (lambda m, x: F.one_hot(x.argmax(1)), "depends on the values"),
    "its own error": (lambda m, x: x.reshape(5, 5), r"to run, got .*x.reshape\(5, 5\).*RuntimeError: shape"),
    "deep in torch": (lambda m, x: m.a(x[:, :2]), r"to run, got .*m.a\(x.*RuntimeError: mat1 and mat2"),
    "makes parameters": (
        lambda m, x: makes(m)(x),
        "'made.weight', which only its first call creates. Run model",
    ),
}


def makes(net: Any) -> nn.Module:
    if not hasattr(net, "made"):
        net.made = nn.Linear(6, 3)
    return net.made


@pytest.mark.parametrize("name", STOPS)
def test_what_stops_a_capture_is_said_by_the_users_line(
    name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    forward, message = STOPS[name]
    net = Calls(forward, a=nn.Linear(6, 6), lstm=nn.LSTM(6, 3, batch_first=True)).eval()
    before = set(vars(net)), set(net._modules)
    with pytest.raises(sc.CaptureError, match=message) as caught:
        sc.trace(net, torch.randn(4, 6))
    text = str(caught.value)
    assert len(text) <= 600
    for raw in ("FakeTensor", "SymInt", "TORCH_LOGS", "u0", "github.com", "Proxy", "report", "bug"):
        assert raw not in text
    assert "made.weight" in text or "test_capture.py:" in text
    assert "made.weight" in text or "Traceback" in caught.value.details
    assert (set(vars(net)), set(net._modules)) == before
    assert capfd.readouterr().err == ""
    assert not caplog.records


def test_parameters_that_are_not_made_yet() -> None:
    with pytest.raises(sc.CaptureError, match=r"'0.weight', which only its first call creates\. Run model"):
        sc.trace(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), torch.zeros(2, 4))


def test_an_exported_module_is_a_model() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    x = torch.randn(8, 6)
    net = torch.export.export(dense, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    graph = sc.trace(net, x)
    assert [group.size for group in graph.groups] == [32]
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(net, plan, graph=graph)
    assert sc.verify(net, small, plan).difference < 1e-9
    assert small(torch.randn(3, 6)).shape == (3, 3)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_a_size_of_one_is_captured_silently(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    graph = sc.trace(net, torch.randn(4, 3, 6))
    sc.score(graph, [torch.randn(4, length, 6) for length in (3, 1)], "activation", progress=False)
    assert capfd.readouterr().err == ""
    assert not caplog.records


def quantised() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    net[2].register_module("inner", torch.ao.nn.quantized.dynamic.Linear(3, 4))
    return net


PLAIN = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (lambda: PLAIN, lambda: torch.zeros(0, 6), r"at least one sample.*Pass a batch that is not empty"),
        (lambda: PLAIN, lambda: torch.ones(4, 6).to_sparse(), r"dense tensors, got one of layout .*Wrap"),
        (
            lambda: PLAIN,
            lambda: torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], layout=torch.jagged),
            r"dense tensors, got a nested tensor.*Wrap",
        ),
        (quantised, lambda: torch.zeros(2, 6), r"a quantised Linear at '2\.inner'.*Prune the model first"),
        (
            lambda: torch.jit.trace(PLAIN, torch.zeros(2, 6)),
            lambda: torch.zeros(2, 6),
            r"got TopLevelTracedModule at the model itself.*before it is scripted",
        ),
    ],
    ids=["empty", "sparse", "nested", "quantised", "scripted"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_what_no_capture_takes_is_refused_in_words(make: Any, inputs: Any, message: str) -> None:
    with pytest.raises(sc.SettingError, match=message):
        sc.trace(make(), inputs())


def test_code_that_leaves_something_out_in_an_export() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            if mask is None and not torch.compiler.is_compiling():
                mask = torch.ones(x.shape[:2], dtype=x.dtype)
            found: torch.Tensor = self.last(self.first(x).relu() * mask[..., None])  # type: ignore[index]
            return found

    net, x = Masked().eval(), torch.randn(2, 5, 6)
    graph = sc.trace(net, x)
    assert [group.size for group in graph.groups] == [9]
    assert torch.equal(graph.program.module()(x), net(x))
