"""Tensors that forward makes once and keeps: none is taken for a constant, none stays at the old size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.common.caches import without_caches
from tests.targets.units.plans import random_plan

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()


@dataclass
class Held:
    """What a model keeps in an object of its own."""

    scale: Tensor | None = None


INSIDE = ["list", "nested", "object", "buffer"]
BESIDE = ["flag", "key", "version", "longest"]
PLACES = ["attribute", "entry", "pair", "late", *INSIDE, *BESIDE]
"""Where a tensor is kept, alone or beside what says that it was made: for which size, from which weights."""


class Cached(nn.Module):
    """Makes a scale for each unit from a parameter once, in evaluation mode, and keeps it in some place."""

    def __init__(self, place: str, *, clears: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.rand(4, 16))
        self.place, self.clears = place, clears
        self.kept: Any = None
        self.table: dict[str, Any] = {}
        self.tables: dict[str, dict[int, Tensor]] = {"scales": {}}
        self.list: list[tuple[str, Tensor]] = []
        self.held = Held()
        self.register_buffer("buffer", None, persistent=False)
        self.made, self.size, self.version = False, 0, -1

    def train(self, mode: bool = True) -> Cached:
        """As in timm, training forgets what is kept."""
        super().train(mode)
        if mode and self.clears:
            self.kept, self.table, self.list, self.held, self.buffer = None, {}, [], Held(), None
            self.tables, self.made, self.size, self.version = {"scales": {}}, False, 0, -1
            self.__dict__.pop("late", None)
        return self

    def nested(self, size: int) -> Tensor:
        """The same from a container in a container, an object, or a buffer that no file holds. [16]"""
        if self.place == "list":
            if not self.list:
                self.list.append(("scale", self.scale[1].detach().clone()))
            return self.list[0][1]
        if self.place == "nested":
            if size not in self.tables["scales"]:
                self.tables["scales"][size] = self.scale[1].detach().clone()
            return self.tables["scales"][size]
        if self.place == "object":
            if self.held.scale is None:
                self.held.scale = self.scale[1].detach().clone()
            return self.held.scale
        if self.buffer is None:
            self.buffer = self.scale[1].detach().clone()
        return self.buffer

    def remembered(self, size: int) -> Tensor:
        """The same, beside what says whether to make it anew. [16]"""
        new = {
            "flag": not self.made,
            "key": size != self.size,
            "version": self.version != self.scale._version,
            "longest": size > self.size,
        }
        if new[self.place]:
            self.kept = self.scale[1].detach().clone()
            self.made, self.size, self.version = True, size, self.scale._version
        return self.kept

    def factor(self, size: int) -> Tensor:
        """What the units are multiplied with. [16]"""
        if self.training:
            return self.scale[1]
        if self.place in INSIDE:
            return self.nested(size)
        if self.place in BESIDE:
            return self.remembered(size)
        if self.place == "entry":
            if "scale" not in self.table:
                self.table["scale"] = self.scale[1]
            return self.table["scale"]
        if self.place == "pair":
            if self.kept is None:
                self.kept = (self.scale[1].detach().clone(), torch.zeros(1))
            return self.kept[0]
        if self.place == "late":
            if not hasattr(self, "late"):
                self.late = self.scale[1].detach().clone()
            return self.late
        if self.kept is None:
            self.kept = self.scale[1]
        return self.kept

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]"""
        return self.o(self.b(self.a(x).relu() * self.factor(len(x))).relu())


@torch.no_grad()
@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_what_was_kept_before_pruning_is_made_anew(place: str, clears: bool) -> None:
    torch.manual_seed(0)
    model = Cached(place, clears=clears).double().eval()
    wanted = model(INPUTS)
    graph = sc.trace(model, INPUTS)
    group = graph["a"]
    assert ("scale", 1) in {(piece.tensor, piece.axis) for piece in group.slices}  # the parameter was seen
    plan = random_plan(graph, 0.5, 0)
    masked = sc.apply(model, plan, "masked", graph=graph)
    for form in ("module", "graph"):
        small = sc.apply(model, plan, form, graph=graph)
        for _ in range(2):
            torch.testing.assert_close(small(INPUTS), masked(INPUTS))
        if form == "module":
            torch.testing.assert_close(small.train()(INPUTS), masked.train()(INPUTS))
            torch.testing.assert_close(small.eval()(INPUTS), masked.eval()(INPUTS))
    torch.testing.assert_close(model(INPUTS), wanted)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_what_the_model_that_a_file_is_loaded_into_keeps_is_made_anew(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Cached(place).double().eval()
    graph = sc.trace(model, INPUTS)
    small = sc.apply(model, random_plan(graph, 0.5, 0), "module", graph=graph)
    model(INPUTS)
    loaded = sc.load(sc.save(small, tmp_path / "small"), lambda: model)
    torch.testing.assert_close(loaded(INPUTS), small(INPUTS))


@pytest.mark.parametrize("place", PLACES)
def test_what_was_kept_after_pruning_does_not_spoil_the_proof(place: str) -> None:
    torch.manual_seed(0)
    model = Cached(place).double().eval()
    graph = sc.trace(model, INPUTS)
    plan = random_plan(graph, 0.5, 0)
    small = sc.apply(model, plan, "module", graph=graph)
    with torch.no_grad():
        small(INPUTS)
    proof = sc.verify(model, small, plan)
    assert proof.proven
    with torch.no_grad():
        small.scale[1] += 1
    with pytest.raises(sc.VerificationError):  # what is kept does not hide it
        sc.verify(model, small, plan)


def test_only_what_the_model_makes_again_is_left_out() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.needed, self.table = torch.ones(6), {"needed": torch.ones(6)}
            self.features: Any = None
            self.state = torch.zeros(6)

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.layer(x)
            out = (
                self.features * self.needed + self.table["needed"] + (0 if self.state is None else self.state)
            )
            self.state = self.state if self.state is not None else torch.zeros(6)
            return out

    model = Keeps()
    model(torch.ones(2, 6))
    model.state += 1  # the output hangs on it
    held = dict(vars(model)) | {"features": model.features}
    with without_caches(model, lambda: ((torch.ones(2, 6),), {})):
        assert model.features is None
        assert model.needed is held["needed"]
        assert set(model.table) == {"needed"}
        assert model.state is held["state"]
    assert model.features is held["features"]


def test_a_table_that_is_made_for_another_size_alone_goes_with_that_size() -> None:
    """As the anchors of YOLO: without them, but with their size, the model fails."""

    class Anchored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)
            self.length, self.anchors = 0, torch.empty(0)

        def forward(self, x: Tensor) -> Tensor:
            if self.length != x.shape[-1]:
                self.length, self.anchors = x.shape[-1], torch.arange(x.shape[-1]).to(x)
            return self.out(self.layer(x).relu()) + self.anchors

    model, x = Anchored().double().eval(), torch.randn(2, 3, 9).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.5, 0)
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    for length in (5, 9):
        given = torch.randn(2, 3, length).double()
        torch.testing.assert_close(small(given), masked(given))
        model(given)
        for other in (x, given):
            with without_caches(small, lambda other=other: ((other,), {})):
                assert (small.anchors, small.length) == (None, 0)
                torch.testing.assert_close(small(given), masked(given))
        assert sc.verify(model, small, plan).proven


def test_a_table_that_the_model_converts_itself_stays_a_tensor() -> None:
    """As the anchors of YOLO: `model.double()` reads them."""

    class Converts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
            self.length, self.table = 0, torch.empty(0)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            self.table = fn(self.table)
            return super()._apply(fn)

        def forward(self, x: Tensor) -> Tensor:
            if self.length != x.shape[0]:
                self.length, self.table = x.shape[0], torch.arange(x.shape[0]).to(x)
            return self.out(self.layer(x).relu()) + self.table[:, None]

    model, x = Converts().eval(), torch.randn(4, 3)
    model(x)
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.5, 0)
    small = sc.apply(model, plan, graph=graph)
    small(x)
    assert sc.verify(model, small, plan).proven


def test_what_the_code_does_not_make_again_stays_beside_what_it_does() -> None:
    """Settings that a method sets, and counts, are no marks of a cache."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls, self.scaled, self.kept, self.made = nn.Linear(6, 6), 0, True, None, False

        def rescale(self, scaled: bool) -> None:
            self.kept, self.scaled = None, scaled

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if not self.made:
                self.kept, self.made = self.layer.weight.sum(), True
            return self.layer(x) * self.kept * (2 if self.scaled else 1)

    model = Counts()
    model(torch.ones(2, 6))
    with without_caches(model, lambda: ((torch.ones(2, 6),), {})):
        assert (model.kept, model.made, model.scaled, model.calls) == (None, False, True, 1)
    assert model.kept is not None
    assert model.made


class MadeReady(nn.Module):
    """Keeps a weight as its products take it, once it has run in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.ready: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]"""
        weight = self.b.weight.t()
        if not self.training:
            self.ready = weight.detach().contiguous() if self.ready is None else self.ready
            weight = self.ready
        return self.o((self.a(x).relu() @ weight + self.b.bias).relu())


def as_its_weights_say(model: nn.Module) -> Tensor:
    fresh = MadeReady().eval()
    fresh.b, fresh.a, fresh.o = model.b, model.a, model.o
    return fresh(INPUTS.float())


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_no_result_has_what_was_made_of_other_weights(granularity: Any) -> None:
    torch.manual_seed(0)
    model, data = MadeReady().eval(), [torch.randn(64, 6) for _ in range(4)]
    model(data[0])
    budget = sc.Budget(sparsity=0.6) if granularity == "weight" else sc.Budget(params=0.6)
    options: Any = {"granularity": granularity, "repair": None, "progress": False}
    small = sc.prune(model, data, budget, **options).model
    torch.testing.assert_close(small(INPUTS.float()), as_its_weights_say(small))
    assert small.ready is not None
    with torch.enable_grad():
        tuned = sc.recover(small, model, data, epochs=1, learning_rate=0.1, progress=False)
    torch.testing.assert_close(tuned(INPUTS.float()), as_its_weights_say(tuned))
    if granularity == "unit":
        better = sc.repair(small, model, data, ["reconstruct"], progress=False)
        torch.testing.assert_close(better(INPUTS.float()), as_its_weights_say(better))
