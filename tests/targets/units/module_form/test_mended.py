"""Mended calls reached by other ways than the traced one: checkpoints, recursion, methods, other branches."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc
from secateur.targets.units.module_form import calls
from secateur.targets.units.module_form.unrealisable import restricted
from tests.targets.units.plans import random_plan


class Base(nn.Module):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)


class Checkpointed(Base):
    """Runs a method under a checkpoint, and only while it trains."""

    def inner(self, h: Tensor) -> Tensor:
        return self.b(h.reshape(-1, 16)).relu()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = checkpoint(self.inner, h, use_reentrant=False) if self.training else self.inner(h)
        return self.out(h).view(len(x), -1, 3)


class Recursive(Base):
    """Goes as deep as its input is long."""

    def deeper(self, h: Tensor, depth: int) -> Tensor:
        return h if depth == 0 else self.deeper((h.reshape(-1, 16) * 0.9).view(h.shape), depth - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.deeper(self.a(x).relu(), x.shape[1])).relu())


class Widths(Base):
    """One line that says two sizes, both written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        for layer, width in ((self.b, 16), (self.out, 12)):
            h = layer(h.reshape(len(x), -1, width)).relu()
        return h


class Stages(Base):
    """Its methods are called from outside too, and one of them twice with tensors of two sizes."""

    def flat(self, h: Tensor, width: int) -> Tensor:
        return h.reshape(-1, width)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.b(self.flat(self.a(x).relu(), 16)).relu()

    @torch.no_grad()
    def forward_head(self, h: Tensor) -> Tensor:
        return self.out(self.flat(h, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Optional(Base):
    """A branch that takes a mask holds a size that another line holds too."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.a(x).relu().reshape(-1, 16)
        if mask is not None:
            h = h.view(len(x), -1, 16) * mask[..., None]
            return self.out(self.b(h).relu())
        return self.out(self.b(h).relu()).view(len(x), -1, 3)


def both(make: Callable[[], nn.Module], ratio: float = 0.4, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The model with a part of its units gone, and masked."""
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    graph = sc.trace(model, x, **settings)
    plan = sc.Uniform(ratio=ratio).allocate(graph, sc.score(graph, None, "magnitude"))
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    assert sc.record_of(small).captured == ("",)
    return small, masked


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [Checkpointed, Recursive, Widths, Stages, Optional])
def test_the_same_line_reached_by_another_way(make: Callable[[], nn.Module], training: bool) -> None:
    small, masked = (copy.deepcopy(m).train(training) for m in both(make))
    for shape in ((2, 5, 6), (3, 9, 6), (1, 1, 6), (16, 12, 6)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(small(x), masked(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("methods", [(), ("forward_features",)])
def test_a_method_that_holds_a_size_is_mended_where_it_is_called_by_itself(methods: tuple[str, ...]) -> None:
    small, masked = both(Stages, methods=methods)
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(small.forward_head(small.forward_features(x)), masked(x))
    torch.testing.assert_close(copy.deepcopy(small).forward_head(small.forward_features(x)), masked(x))


def test_a_line_that_never_ran_and_says_a_size_that_shrank_is_refused_in_words() -> None:
    small, _ = both(Optional)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    with pytest.raises(sc.InputError, match=r"test_mended.py, forward \(line \d+\): .* view with 16"):
        small(x, torch.ones(2, 5, dtype=torch.float64))


class Chained(Base):
    """What one call says afterwards, another says before: a compiler must not change it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.out = nn.Linear(16, 8), nn.Linear(8, 3)

    def inner(self, h: Tensor) -> Tensor:
        return self.out(self.b(h.reshape(-1, 16)).relu().reshape(-1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.a(x).relu())


class Live(Base):
    """The same function, given sizes that vary where another call's shrinks."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu().reshape(-1, 16)
        h = h.T.reshape(-1, len(h)).T
        return self.out(self.b(h).relu())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("make", "whole"),
    [(Stages, True), (Widths, True), (Optional, False), (Chained, False), (Live, False)],
)
def test_torch_compile(make: Callable[[], nn.Module], whole: bool, dynamic: bool | None) -> None:
    """It compiles as a whole where what calls say tells them apart; elsewhere to try has no effect."""
    small, masked = both(make, ratio=0.5)
    torch._dynamo.reset()
    compiled, full = (
        torch.compile(small, backend="eager", dynamic=dynamic, fullgraph=f) for f in (False, True)
    )
    for shape in ((2, 5, 6), (3, 9, 6), (8, 16, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), masked(x), rtol=1e-11, atol=1e-11)
        torch._dynamo.reset()  # or it takes what was compiled in parts
        if whole:
            torch.testing.assert_close(full(x), masked(x), rtol=1e-11, atol=1e-11)
        else:
            with pytest.raises(Exception, match="secateur mends sizes"):
                full(x)
        torch.testing.assert_close(small(x), masked(x), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(copy.deepcopy(small)(x), masked(x), rtol=1e-11, atol=1e-11)


class Plain(Base):
    """Only a branch for a mask, and a method that nothing calls, hold sizes."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.a(x).relu()
        if mask is not None:
            h = h.reshape(-1, 16) * mask.reshape(-1, 1)
            h = h.view(*x.shape[:2], 16)
        return self.out(self.b(h).relu())

    def embed(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().reshape(-1, 16))

    def tokens(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 6)


def test_where_only_lines_that_never_ran_hold_a_size_they_are_named_and_refused() -> None:
    torch.manual_seed(0)
    model, x = Plain().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.Uniform(ratio=0.4).allocate(graph, sc.score(graph, None, "magnitude"))
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    assert sc.record_of(small).captured == ()
    assert "did not run at trace" in sc.record_of(small).note
    torch.testing.assert_close(small(x), masked(x))
    torch.testing.assert_close(small.tokens(x), masked.tokens(x))
    with pytest.raises(sc.InputError, match=r"forward \(line \d+\): .* reshape with 16"):
        small(x, torch.ones(2, 5, dtype=torch.float64))
    with pytest.raises(sc.InputError, match=r"embed \(line \d+\): .* reshape with 16"):
        small.embed(x)


@pytest.mark.parametrize("make", [Stages, Widths, Optional])
def test_a_mended_module_is_pruned_once_more(make: Callable[[], nn.Module]) -> None:
    small, _ = both(make)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    graph = sc.trace(small, x)
    plan = sc.Uniform(ratio=0.3).allocate(graph, sc.score(graph, None, "magnitude"))
    smaller, masked = (sc.apply(small, plan, form, graph=graph) for form in ("module", "masked"))
    for shape in ((2, 5, 6), (3, 9, 6)):
        y = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(smaller(y), masked(y), rtol=1e-11, atol=1e-11)
    if make is Stages:
        torch.testing.assert_close(smaller.forward_head(smaller.forward_features(y)), masked(y))


class Folded(nn.Module):
    """Folds channels into heads, and leaves all but its number of heads out of copies."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def __getstate__(self) -> dict[str, int]:
        return {"heads": self.heads}

    def __setstate__(self, state: dict[str, int]) -> None:
        super().__init__()
        self.heads = state["heads"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), 4, 4).transpose(1, 2).reshape(len(x), -1)


class Forgetful(nn.Module):
    """Heads of a product, folded and unfolded by a module whose class has a way of its own to be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fold, self.b = nn.Linear(6, 16), Folded(4), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.fold(self.a(x).relu()))


def test_copies_and_pickles_keep_what_is_mended_in_classes_with_ways_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Forgetful().eval(), torch.randn(2, 6)
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.5, 0)
    small = sc.apply(model, plan, "module", graph=graph)
    assert "fold" in sc.record_of(small).captured
    wanted = small(x)
    file = io.BytesIO()
    torch.save(copy.deepcopy(small), file)
    file.seek(0)
    for again in (copy.deepcopy(copy.deepcopy(small)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(again(x), wanted)
        assert again.fold.forward.module is again.fold  # type: ignore[union-attr]
    assert sc.verify(model, small, plan).difference <= 1e-9


class Attention(nn.Module):
    """Attention by hand, whose code reads the size of a head off a tensor that may have shrunk."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.into, self.back = heads, nn.Linear(6, width), nn.Linear(width, 3)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def attended(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.back(x + self.out(self.attended(x)))


class Rotated(Attention):
    """A rotary embedding by hand: its table has as many columns as a head, and halves are swapped."""

    def attended(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        q, k, v = (f(x).view(batch, length, self.heads, size).transpose(1, 2) for f in self.three())
        speed = 1 / (100 ** (torch.arange(0, size, 2, dtype=x.dtype) / size))
        angle = torch.arange(length, dtype=x.dtype)[:, None] * speed
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        turn = lambda t: torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1)  # noqa: E731
        q, k = q * cos + turn(q) * sin, k * cos + turn(k) * sin
        return ((q @ k.mT / size**0.5).softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)

    def three(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


class Narrowed(Rotated):
    """The same with pairs that are side by side, keyword arguments, ``narrow`` and numbers from behind."""

    def attended(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        q, k, v = (f(x).view(batch, length, self.heads, size).transpose(1, 2) for f in self.three())
        speed = 0.1 ** (torch.arange(end=size, start=0, step=2, dtype=x.dtype) / size)
        angle = torch.arange(length, dtype=x.dtype)[:, None] * speed
        one, two = q.narrow(-1, 0, size // 2), q[..., -(size // 2) :]
        q = torch.cat([one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], -1)
        return ((q @ k.mT * size**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)


class Complex(Rotated):
    """A rotary embedding by complex numbers."""

    def attended(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        q, k, v = (f(x).view(batch, length, self.heads, size) for f in self.three())
        speed = 1 / (100 ** (torch.arange(0, size, 2, dtype=x.dtype) / size))
        angle = torch.arange(length, dtype=x.dtype)[:, None] * speed
        turns = torch.polar(torch.ones(length, size // 2, dtype=x.dtype), angle)[None, :, None]
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(t.reshape(batch, length, self.heads, size // 2, 2)) * turns
            ).flatten(3)
            for t in (q, k)
        )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        done = nn.functional.scaled_dot_product_attention(q, k, v)
        return done.transpose(1, 2).reshape(batch, length, width)


class InTheBatch(Attention):
    """Heads go into the batch, in one line with two calls of `view` that three layers share."""

    def attended(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        h, d = self.heads, width // self.heads
        fold = lambda t: t.view(n, length, h, d).transpose(1, 2).contiguous().view(n * h, length, d)  # noqa: E731
        q, k, v = fold(self.q(x)), fold(self.k(x)), fold(self.v(x))
        done = torch.bmm(torch.bmm(q, k.mT * d**-0.5).softmax(-1), v).view(n, h, length, d)
        return done.transpose(1, 2).reshape(n, length, width)


class Shared(Attention):
    """All heads share one key and one value, split off a layer that loses nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(32, 16)

    def attended(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        q = self.q(x).view(batch, length, self.heads, size).transpose(1, 2)
        k, v = self.both(x).split([size, size], -1)
        done = (q @ k.unsqueeze(1).mT / size**0.5).softmax(-1) @ v.unsqueeze(1)
        return done.transpose(1, 2).reshape(batch, length, width)


@pytest.mark.parametrize("names", [("into",), ("q",), ("into", "q")])
@pytest.mark.parametrize("make", [Rotated, Narrowed, Complex, InTheBatch, Shared])
def test_attention_by_hand_whose_head_size_is_read_off_a_tensor(
    make: Callable[[], nn.Module], names: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    graph = sc.trace(model, torch.randn(2, 6, 6, dtype=torch.float64))
    plan = restricted(random_plan(graph, 0.4, 1), graph, list(names))
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    assert [g.name for g in plan.groups if g.removed] == list(names)
    for training in (False, True):
        small.train(training), masked.train(training)
        for shape in ((2, 6, 6), (1, 1, 6), (3, 9, 6), (4, 8, 6), (8, 4, 6), (2, 32, 6)):
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(small(x), masked(x), rtol=1e-10, atol=1e-10)


class Halves(Shared):
    """Takes a part of each head that an attribute decides."""

    part = 2

    def attended(self, x: Tensor) -> Tensor:
        size = x.shape[-1] // self.heads
        k = self.both(x)[..., : size // self.part]
        return self.q(x) * k.mean(-1, keepdim=True)


def test_a_position_that_is_not_the_one_that_was_replaced_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Halves().double().eval(), torch.randn(2, 6, 6, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = restricted(random_plan(graph, 0.4, 1), graph, ["into"])
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    torch.testing.assert_close(small(x), masked(x))
    small.part = 1
    with pytest.raises(sc.InputError, match="expected __getitem__ to be given"):
        small(x)


def test_a_range_up_to_a_number_from_data_is_left_as_it_is() -> None:
    """Text to speech counts frames so: ``torch.arange(lengths.max())``, which has no number on meta."""
    for device in ("meta", "cpu"):
        most = torch.tensor(3, device=device)
        assert calls.count("arange", (most,), {"step": 2}) == 2
        args, kwargs = calls._with_number("range", (None, 1), (most,), {"step": 2})
        assert args[0] is most
        assert kwargs == {"step": 1}
