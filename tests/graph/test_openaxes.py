"""Which axes may vary, what a model may be fed, and groupings that hold at one size only."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph.inputs import Arguments, InputSpec, OpenAxis
from secateur.graph.openaxes import _candidates, find_open_axes
from tests.targets.units.plans import random_plan


class Pictures(nn.Module):
    """A convolutional network that pools, with a flat head if asked."""

    def __init__(self, side: int = 0) -> None:
        super().__init__()
        self.side = side
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * max(side, 1) ** 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h.flatten(1) if self.side else h.mean((2, 3)))


class Words(nn.Module):
    """A tagger that reads ids and a mask, and takes at most ten of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 8), nn.Embedding(10, 8)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.b(self.a(h * mask[..., None]).relu())


def axes(spec: InputSpec) -> list[tuple[tuple[tuple[str, int], ...], int]]:
    return [(axis.places, axis.size) for axis in spec.open]


def test_height_and_width_vary_alone_and_channels_do_not() -> None:
    spec = sc.trace(Pictures().eval(), torch.randn(2, 3, 6, 6)).inputs
    assert axes(spec) == [((("x", 0),), 2), ((("x", 2),), 6), ((("x", 3),), 6)]
    assert len({axis.other for axis in spec.open[1:]}) == 2
    (fixed,) = spec.fixed
    assert (fixed.places, fixed.size) == ((("x", 1),), 3)
    assert "self.a(x).relu()" in fixed.where
    assert spec.together


def test_a_flat_head_fixes_the_picture() -> None:
    spec = sc.trace(Pictures(6).eval(), torch.randn(2, 3, 6, 6)).inputs
    assert axes(spec) == [((("x", 0),), 2)]
    assert {places for f in spec.fixed for places in f.places} == {("x", 1), ("x", 2), ("x", 3)}


def test_ids_and_their_mask_vary_together_and_are_drawn_over_the_vocabulary() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 1]] * 2)
    spec = sc.trace(Words().eval(), {"ids": ids, "mask": torch.ones(2, 10, dtype=torch.long)}).inputs
    assert axes(spec)[1:] == [((("ids", 1), ("mask", 1)), 10)]
    assert spec.open[1].other < 10  # there are ten places only
    for title, args, kwargs in spec.examples():
        assert args == (), title
        assert int(kwargs["ids"].max()) > 9
        lengths = kwargs["mask"].sum(1)
        assert lengths.max() == kwargs["mask"].shape[1] > lengths.min() >= 1
        assert (kwargs["mask"].diff(dim=1) <= 0).all()
    assert len(spec.examples()) == 2


def test_a_mask_that_goes_unread_without_padding_still_varies_with_its_ids() -> None:
    class Skipping(Words):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(ids, torch.ones_like(ids) if bool(mask.all()) else mask)

    ids = torch.randint(0, 30, (2, 10))
    model = Skipping().eval()
    assert model(ids, torch.ones(2, 7)).shape == (2, 10, 3)
    mask = torch.ones(2, 10, dtype=torch.long)
    spec = InputSpec.of((), {"ids": ids, "mask": mask})

    def attempt(arguments: Arguments) -> Exception | None:
        try:
            model(*arguments[0], **arguments[1])
        except Exception as error:
            return error
        return None

    found = find_open_axes(spec, ((), {"ids": ids, "mask": mask}), attempt)
    assert axes(found)[1:] == [((("ids", 1), ("mask", 1)), 10)]


def test_the_users_own_batches_say_what_varies() -> None:
    long, short = torch.randn(4, 9, 6), torch.randn(4, 5, 6)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    spec = sc.trace(model, long, more_inputs=[short]).inputs
    assert spec.open == (
        OpenAxis(places=(("input", 1),), size=9, other=5),
        OpenAxis(places=(("input", 0),), size=4, other=1, batch=True),
    )


class Nodes(nn.Module):
    """As many nodes as features: x [graphs, nodes, 6] and adjacency [graphs, nodes, nodes]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor, mode: str = "") -> torch.Tensor:
        h = (adjacency @ self.a(x)).relu()
        if x.shape[1] > 8 or x.shape[1] == 1 or mode:
            h = h.flip(-1)
        return self.o(self.b(h).relu())


def test_other_arguments_are_captured_and_compared_too() -> None:
    class Switched(Nodes):
        def forward(
            self,
            x: torch.Tensor,
            mask: torch.Tensor | None = None,
            mode: str = "",
            past: torch.Tensor | None = None,
            **options: object,
        ) -> torch.Tensor:
            h = self.a(x).relu()
            h = h.flip(-1) if mode else h
            h = h.roll(1, -1) if x.ndim == 2 else h
            return self.o(self.b(h if mask is None else h.flip(-1) * mask[..., None]).relu())

    model, x = Switched().double().eval(), torch.randn(2, 5, 6).double()
    others = [{"x": x, "mode": "turn"}, (x[0],), {"x": x, "mask": torch.ones(2, 5).double()}]
    graph = sc.trace(model, x, more_inputs=[*others, x[:, :3]])
    plan = random_plan(graph, 0.5, 0)
    for form in ("module", "masked"):
        small, masked = sc.apply(model, plan, form, graph=graph), sc.apply(model, plan, "masked")
        for given in ((x,), *others):
            args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
            torch.testing.assert_close(small(*args, **kwargs), masked(*args, **kwargs))
    proof = sc.verify(model, sc.apply(model, sc.Plan.from_json(plan.to_json())), plan)
    assert {"x [5, 6]", "x [2, 5, 6], mask [2, 5]"} <= set(proof.sizes)
    said = "no other value of `past` and `**options` was tried; `mode` was tried with 2 values only"
    assert said in graph.inputs.sentence()
    with pytest.raises(sc.CaptureError, match="to run"):
        sc.trace(model, x, more_inputs=[{"x": x, "mask": x[:, :, :4]}])


def test_other_arguments_are_looked_at_in_all_ways() -> None:
    class Masked(Nodes):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            h = self.a(x).relu()
            if mask is not None:
                h = h.flip(-1) if x.shape[1] > 8 else h
                h = h.roll(3, -1) if self.training else h
                h = h * mask[..., None]
            return self.o(self.b(h).relu())

    model, x = Masked().double().eval(), torch.randn(2, 5, 6).double()
    graph = sc.trace(model, x, more_inputs=[{"x": x, "mask": torch.ones(2, 5).double()}])
    plan = random_plan(graph, 0.5, 0)
    small, masked = sc.apply(model, plan, "module", graph=graph), sc.apply(model, plan, "masked")
    proof = sc.verify(model, small, plan)
    assert any("mask [2, 9]" in title for title in proof.sizes)
    for training in (False, True):
        for length in (1, 5, 9, 12):
            x, mask = torch.randn(3, length, 6).double(), torch.rand(3, length).double()
            for given in ((x,), (x, mask)):
                expected = masked.train(training)(*given)
                torch.testing.assert_close(small.train(training)(*given), expected)


@pytest.mark.parametrize("nodes", [1, 5, 6])
def test_some_of_the_axes_of_one_size_vary_together(nodes: int) -> None:
    model = Nodes().double().eval()
    inputs = [(torch.randn(2, n, 6).double(), torch.randn(2, n, n).double()) for n in (nodes, 1, 5, 9)]
    graph = sc.trace(model, inputs[0])
    assert any({("x", 1), ("adjacency", 2)} <= set(axis.places) for axis in graph.inputs.open)
    plan = random_plan(graph, 0.5, 0)
    small, masked = sc.apply(model, plan, "module", graph=graph), sc.apply(model, plan, "masked")
    for given in inputs:
        torch.testing.assert_close(small(*given), masked(*given))
    assert "no other value of `mode` was tried" in graph.inputs.sentence()


class Reading(nn.Module):
    """Attention over keys and values of the caller's. PyTorch's kernel takes fewer values than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(*sizes) for sizes in ((6, 8), (5, 8), (4, 8), (8, 3)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (self.q(q), self.k(k), self.v(v))]
        return self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def test_each_key_has_a_value() -> None:
    model, x = Reading().eval(), (torch.randn(2, 5, 6), torch.randn(2, 9, 5), torch.randn(2, 9, 4))
    places = [axis.places for axis in sc.trace(model, x).inputs.open]
    assert (("k", 1), ("v", 1)) in places


def test_labels_that_count_for_nothing_are_not_drawn(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Embedding(9, 12), nn.Linear(12, 10), nn.Linear(10, 7)

        def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.o(self.b(self.a(ids)).relu())
            return F.cross_entropy(logits.mT, labels), logits

    torch.manual_seed(0)
    labels = torch.tensor([[-100, -100, 6], [0, 3, 2]])
    model, given = Classifier().eval(), (torch.randint(9, (2, 3)), labels)
    graph = sc.trace(model, given)
    assert graph.inputs.drawn
    assert [(leaf.low, leaf.high) for leaf in graph.inputs.tensors().values()] == [(0, 8), (0, 6)]
    plan = sc.Uniform(ratio=0.5).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(model, plan, "graph", graph=graph)
    assert sc.verify(model, small, plan).proven  # without inputs of the user's
    loaded = sc.load(sc.save(small, tmp_path), lambda: Classifier().eval())
    assert all(map(torch.equal, loaded(*given), small(*given)))


def test_nothing_is_drawn_that_the_model_cannot_take() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and bool((x[:, 0].diff() < 0).any()):
                raise ValueError("rows are not in order")
            return self.b(self.a(x).relu())

    x = torch.arange(18.0).reshape(6, 3)
    assert not sc.trace(Sorted().eval(), x).inputs.drawn


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 10, 32, 224])
def test_the_first_other_sizes_are_not_the_same_inside(size: int) -> None:
    """Neither behind a stride of two, nor to code that asks whether a size is odd."""
    first, *_ = others = _candidates(size)
    assert size not in others
    assert min(others) >= 2
    assert (first - size) % 2
    assert size < 4 or math.ceil(first / 2) != math.ceil(size / 2)


def test_a_grouping_that_holds_at_one_size_only_is_none() -> None:
    class Regrouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.b, self.o = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.i(x)
            return self.o(x + self.b(x).flatten(2).transpose(1, 2).reshape(x.shape))

    model, x = Regrouped().eval(), torch.randn(2, 3, 2, 2)
    try:
        graph = sc.trace(model, x)
    except sc.NothingToPruneError:
        return
    plan = sc.Uniform(ratio=0.4).allocate(graph, sc.score(graph, None, "magnitude"))
    small, masked = sc.apply(model, plan, graph=graph), sc.apply(model, plan, "masked")
    for size in ((2, 2), (4, 4), (3, 5)):
        y = torch.randn(2, 3, *size)
        torch.testing.assert_close(small(y), masked(y))


class Mixing(nn.Module):
    """Halves pictures some times, mixes channels with places, and adds what was before the last half."""

    def __init__(self, halves: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3 if k == 0 else 4, 4, 3, 2, 1) for k in range(halves))
        self.inside, self.mixed, self.out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width]; both have to be multiples of 2 ** halves."""
        before = x
        for layer in self.down:
            before, x = x, layer(x).relu()
        h = self.inside(x)
        h = h + self.mixed(h).flatten(2).transpose(1, 2).reshape(h.shape)
        larger = nn.functional.interpolate(h, scale_factor=2.0)
        return self.out(torch.cat([before, larger], 1))


@pytest.mark.parametrize("places", [1, 2, 4])
@pytest.mark.parametrize("halves", [2, 3, 4])
def test_other_sizes_do_not_leave_a_single_place(halves: int, places: int) -> None:
    """Where a picture becomes a single place, any grouping of channels with places holds."""
    step = 2**halves
    net, x = Mixing(halves).double().eval(), torch.randn(2, 3, step * places, step * places).double()
    try:
        graph = sc.trace(net, x)
    except sc.NothingToPruneError:
        return
    plan = sc.Uniform(ratio=0.4).allocate(graph, sc.score(graph, None, "magnitude"))
    small, masked = (sc.apply(net, plan, form, graph=graph) for form in ("module", "masked"))
    for height, width in ((2, 2), (3, 4), (5, 2)):
        picture = torch.randn(1, 3, step * height, step * width).double()
        torch.testing.assert_close(small(picture), masked(picture))


def test_a_trace_leaves_caches_and_counters_as_they_were() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.seen = nn.Linear(6, 8), nn.Linear(8, 2), [0]
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            self.last = x
            self.count += 1
            return self.b(self.a(x).relu())

    model = Caching().eval()
    sc.trace(model, torch.randn(3, 6))
    assert model.seen == [0]
    assert not hasattr(model, "last")
    assert float(model.count) == 0
