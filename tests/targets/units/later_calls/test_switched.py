"""Arguments of a pruned module that no trace has had, switches and tensors: right, or refused in words."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.targets.units.later_calls import callcheck
from secateur.targets.units.masked import masked
from tests.targets.units.plans import random_plan

WAYS = {
    "per unit": lambda net, h: h.tanh(),
    "scaled": lambda net, h: h * 3,
    "other places": lambda net, h: h.flip(-1),
    "mixed": lambda net, h: h.softmax(-1),
    "own layer": lambda net, h: net.own(h),
    "halves": lambda net, h: torch.cat([h[..., :4] * 2, h[..., 4:]], -1),
}
RIGHT = ("per unit", "scaled")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.own = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(9, 9)

    def forward(self, x: Tensor, way: str = "", pooled: bool = False, step: int = 0, **more: Any) -> Tensor:
        """[batch, length, 6] to [batch, length, 4], or to [batch, 4]."""
        hidden = torch.relu(self.body(x)) + step
        if way or more.get("other"):
            hidden = WAYS[way or more["other"]](self, hidden)
        found = self.head(hidden)
        return found.mean(1) if pooled else found


def pruned(model: nn.Module, x: Any, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    graph = sc.trace(model, x, **options)
    keep = {g.name: np.arange(g.size) % 3 != 1 for g in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="every third")
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    return small, masked


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 6).double()


@pytest.mark.parametrize("where", ["named", "positional", "more"])
@pytest.mark.parametrize("way", WAYS)
def test_a_switch_is_right_or_refused(way: str, where: str, x: Tensor) -> None:
    small, masked = pruned(Net().double().eval(), x)
    args = (way,) if where == "positional" else ()
    kwargs = {"named": {"way": way}, "positional": {}, "more": {"other": way}}[where]
    if way in RIGHT:
        torch.testing.assert_close(small(x, *args, **kwargs), masked(x, *args, **kwargs))
    else:
        with pytest.raises(sc.InputError, match="more_inputs") as raised:
            small(x, *args, **kwargs)
        assert way in str(raised.value)
        assert len(str(raised.value)) < 600
    torch.testing.assert_close(small(x), masked(x))


@pytest.mark.parametrize("way", ["halves", "own layer"])
def test_a_switch_that_the_trace_had_is_free(way: str, x: Tensor) -> None:
    small, masked = pruned(Net().double().eval(), x, more_inputs=[{"x": x, "way": way}])
    torch.testing.assert_close(small(x, way=way), masked(x, way=way))


def test_switches_behind_the_layers_that_were_cut_are_free(x: Tensor) -> None:
    small, masked = pruned(Net().double().eval(), x)
    torch.testing.assert_close(small(x, pooled=True), masked(x, pooled=True))


def test_a_number_that_is_no_switch_is_looked_into_a_few_times(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, masked = pruned(Net().double().eval(), x)
    looked = []
    monkeypatch.setattr(
        callcheck, "run_once", lambda *a, tried=callcheck.run_once, **k: looked.append(a) or tried(*a, **k)
    )
    for step in range(40):
        for _ in range(2):
            torch.testing.assert_close(small(x, step=step), masked(x, step=step))
    assert 0 < len(looked) < 40


def test_switches_that_are_wrong_together_alone(x: Tensor) -> None:
    class Both(Net):
        def forward(self, x: Tensor, a: bool | None = None, b: bool | None = None) -> Tensor:  # type: ignore[override]
            hidden = torch.relu(self.body(x))
            return self.head(hidden.softmax(-1) if a and b else hidden.tanh() if a or b else hidden)

    small, masked = pruned(Both().double().eval(), x)
    for args in ((True,), (None, True), (True, False)):
        torch.testing.assert_close(small(x, *args), masked(x, *args))
    with pytest.raises(sc.InputError, match="a=True, b=True"):
        small(x, True, True)


def test_a_loaded_or_copied_module_knows_its_switches(tmp_path: Path, x: Tensor) -> None:
    model = Net().double().eval()
    small, _ = pruned(model, x)
    sc.save(small, tmp_path / "small")
    for found in (sc.load(tmp_path / "small", lambda: Net().double()), pickle.loads(pickle.dumps(small))):
        torch.testing.assert_close(found(x, way="scaled"), small(x, way="scaled"))
        with pytest.raises(sc.InputError, match="more_inputs"):
            found(x, way="mixed")


def test_a_call_that_the_dense_model_does_not_take_fails_as_there(x: Tensor) -> None:
    small, masked = pruned(Net().double().eval(), x)
    for model in (small, masked):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(x[..., :5], way="mixed")


TENSOR_WAYS = {
    "scaled": lambda net, h, mask: h * mask[..., None],
    "filled": lambda net, h, mask: h.masked_fill(mask[..., None] > 0, 0.5),
    "chosen": lambda net, h, mask: torch.where(mask[..., None] > 0, h, h.tanh()),
    "other places": lambda net, h, mask: h.flip(-1) * mask[..., None],
    "mixed": lambda net, h, mask: h.softmax(-1) * mask[..., None],
    "own layer": lambda net, h, mask: net.own(h) * mask[..., None],
    "counted": lambda net, h, mask: h * torch.arange(h.shape[-1]) + mask[..., None],
    "sorted by it": lambda net, h, mask: h[..., mask[0].argsort()],
}
RIGHT_WITH_TENSORS = ("scaled", "filled", "chosen")


class Masked(Net):
    """Goes one way with a mask, and another way without."""

    def __init__(self, way: str, *, given: bool) -> None:
        super().__init__()
        self.way, self.given = way, given

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[batch, length, 6] and [batch, length] to [batch, length, 4]."""
        hidden = torch.relu(self.body(x))
        if (mask is not None) == self.given:
            hidden = TENSOR_WAYS[self.way](self, hidden, x[..., 0] if mask is None else mask)
        elif mask is not None:
            hidden = hidden + mask[..., None]
        return self.head(hidden)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("way", TENSOR_WAYS)
def test_a_tensor_given_or_left_out_is_right_or_refused(way: str, given: bool, x: Tensor) -> None:
    """`given`: the trace had no mask, and the call has one. Else the other way round."""
    with_mask = {"x": x, "mask": torch.rand(2, 5).double()}
    traced, called = ({"x": x}, with_mask) if given else (with_mask, {"x": x[:, :4]})
    small, masked = pruned(Masked(way, given=given).double().eval(), traced)
    torch.testing.assert_close(small(**traced), masked(**traced))
    if way in RIGHT_WITH_TENSORS:
        torch.testing.assert_close(small(**called), masked(**called))
    else:
        with pytest.raises(sc.InputError, match=r"more_inputs") as raised:
            small(**called)
        assert ("mask=a tensor" if given else "mask=None") in str(raised.value)
    torch.testing.assert_close(small(**traced), masked(**traced))


class Attending(nn.Module):
    """Attention with fewer keys than queries, which code with a mask repeats itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, n) for n in (16, 8, 8, 8))
        self.o = nn.Linear(16, 8)

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None, h: Tensor | None = None) -> Tensor:
        """[batch, length, 8], or the same as `h`, with a mask [batch, length]."""
        x = h if x is None else x.tanh()
        assert x is not None
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if mask is not None:
            k, v = (
                t[:, :, None, :, :].expand(len(t), t.shape[1], 2, *t.shape[2:]).flatten(1, 2) for t in (k, v)
            )
            mask = mask[:, None, None, :]
        found = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None
        )
        return self.o(found.transpose(1, 2).flatten(2))


def test_attention_takes_a_mask_that_the_trace_had_not(x: Tensor) -> None:
    x = torch.randn(2, 5, 8).double()
    small, masked = pruned(Attending().double().eval(), x)
    assert small.q.weight.shape[0] < 16
    keep = torch.rand(2, 5) > 0.3
    keep[:, 0] = True
    for call in ({"x": x, "mask": keep}, {"h": x}, {"h": x, "mask": keep}):
        torch.testing.assert_close(small(**call), masked(**call))


STATES = {
    "requires_grad": (lambda x: x.requires_grad, lambda x: x.clone().requires_grad_()),
    "is_contiguous": (
        lambda x: not x.is_contiguous(),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_how_a_tensor_is_may_choose(state: str, way: str, x: Tensor) -> None:
    asks, turned = STATES[state]

    class Asking(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            hidden = torch.relu(self.body(x))
            return self.head(WAYS[way](self, hidden) if asks(x) else hidden)

    small, masked = pruned(Asking().double().eval(), x)
    if way in RIGHT:
        torch.testing.assert_close(small(turned(x)), masked(turned(x)))
    else:
        with pytest.raises(sc.InputError, match=f"{state}.*more_inputs"):
            small(turned(x))
    torch.testing.assert_close(small(x), masked(x))


def test_a_tensor_that_lies_apart_in_memory_is_free() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
        )
        images = torch.randn(2, 3, 8, 8).double()
        small, masked = pruned(net.double().eval(), images)
    for given in (images.to(memory_format=torch.channels_last), images.transpose(2, 3), images[..., :8]):
        torch.testing.assert_close(small(given), masked(given))


def test_what_is_left_out_where_no_drawn_tensor_fits(x: Tensor) -> None:
    """As pictures, of which a text has to name as many as there are. The rest of the call is looked into."""

    class Fitting(Net):
        def forward(  # type: ignore[override]
            self, x: Tensor, pictures: Tensor | None = None, mask: Tensor | None = None
        ) -> Tensor:
            hidden = torch.relu(self.body(x))
            if pictures is not None:
                if x.shape[1] != len(pictures) + 3:
                    raise ValueError("other pictures than the text names")
                hidden = hidden + pictures.sum()
            if mask is not None:
                hidden = hidden.flip(-1) if mask.ndim == 1 else hidden * mask[..., None]
            return self.head(hidden)

    small, masked = pruned(Fitting().double().eval(), {"x": x, "pictures": torch.randn(2, 3).double()})
    x = x[:, :4]
    torch.testing.assert_close(small(x), masked(x))
    with pytest.raises(sc.InputError, match="mask=a tensor"):
        small(x, mask=x[0, :, 0])
    torch.testing.assert_close(small(x, mask=x[..., 0]), masked(x, mask=x[..., 0]))


class Chosen(nn.Module):
    """Two layers out of four, chosen by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 9)), nn.Parameter(torch.randn(4, 9, 3))

    def forward(self, x: Tensor, number: int = 0) -> Tensor:
        hidden = (x @ self.up[number]).relu()
        found: Tensor = hidden @ self.down[number]
        return found if number else found + hidden[..., number].sum() * 0


def test_another_one_of_layers_that_are_cut_alike() -> None:
    torch.manual_seed(0)
    net, x = Chosen().eval().double(), torch.randn(5, 6, dtype=torch.float64)
    graph = sc.trace(net, (x, 1))
    plan = random_plan(graph, 0.4)
    small, dense = sc.apply(net, plan, graph=graph, example_inputs=(x, 1)), masked(net, plan)
    for number in (2, 3, -1):
        assert torch.allclose(small(x, number), dense(x, number), rtol=1e-12)
    with pytest.raises(sc.InputError, match="number=0"):  # selects a unit
        small(x, 0)


class Rescaled(nn.Module):
    """Writes into the tensor that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        hidden = x + 0 if hidden is None else hidden  # type: ignore[operator]
        hidden *= 2
        found: Tensor = self.last(self.body(hidden).relu())
        return found


def test_a_tensor_with_gradients_that_the_code_writes_into() -> None:
    torch.manual_seed(0)
    net, x = Rescaled().eval().double(), torch.randn(4, 6, dtype=torch.float64)
    graph = sc.trace(net, x)
    plan = random_plan(graph, 0.4)
    small, dense = sc.apply(net, plan, graph=graph, example_inputs=x), masked(net, plan)
    made = x * nn.Parameter(x[:1])
    for given in (made, made.t().contiguous().t(), made[:1].expand(4, 6)[:, ::2].repeat(1, 2)):
        assert torch.allclose(small(hidden=given.clone()), dense(hidden=given.clone()), rtol=1e-12)


class LaidOut(nn.Module):
    """Heads whose places in memory depend on a switch, so that a reshape is a view, or a copy and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, packed: bool = True) -> Tensor:
        heads = self.first(x).view(len(x), x.shape[1], -1, 3).transpose(1, 2)
        if packed:
            heads = torch.cat([heads, heads[:, :, :0]], 2)
        rows = heads.reshape(len(x) * heads.shape[1], -1, 3).relu()
        found: Tensor = self.last(rows.view(len(x), -1, x.shape[1], 3).transpose(1, 2).flatten(2))
        return found


def test_a_view_and_a_copy_of_the_same_units() -> None:
    torch.manual_seed(0)
    net, x = LaidOut().eval().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    graph = sc.trace(net, x)
    plan = random_plan(graph, 0.4)
    small, dense = sc.apply(net, plan, graph=graph, example_inputs=x), masked(net, plan)
    assert plan.groups[0].removed
    assert torch.allclose(small(x, packed=False), dense(x, packed=False), rtol=1e-12)


class Positions(nn.Module):
    """Divides positions by a number that is a multiple of what a layer of 16 units keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.longest = nn.Linear(6, 16), nn.Linear(16, 3), 20

    def forward(self, x: Tensor, positions: Tensor | None = None, other: bool = False) -> Tensor:
        if positions is None:
            positions = torch.arange(x.shape[1])
        hidden = self.first(x).relu()
        scale = positions / (2 * hidden.shape[-1] if other else self.longest)
        found: Tensor = self.last(hidden * (1 + scale)[:, None])
        return found


def test_positions_that_are_divided_by_what_may_be_a_size() -> None:
    torch.manual_seed(0)
    net, x = Positions().eval().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    graph = sc.trace(net, x)
    plan = random_plan(graph, 0.4)
    assert plan.groups[0].kept == 10
    small, dense = sc.apply(net, plan, graph=graph, example_inputs=x), masked(net, plan)
    places = torch.arange(5).flip(0)
    assert torch.allclose(small(x, places), dense(x, places), rtol=1e-12)
    with pytest.raises(sc.InputError, match="other=True"):
        small(x, places, other=True)
