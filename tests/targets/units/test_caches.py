"""Tensors that forward makes once and keeps: none is taken for a constant, none stays at the old size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.common.caches import without_caches
from tests.targets.units.plans import random_plan

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()


class Cached(nn.Module):
    """Makes a scale for each unit from a parameter once, in evaluation mode, and keeps it in some place."""

    def __init__(self, place: str, *, clears: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.rand(4, 16))
        self.place, self.clears = place, clears
        self.kept: Any = None
        self.table: dict[str, Any] = {}

    def train(self, mode: bool = True) -> Cached:
        """As in timm, training forgets what is kept."""
        super().train(mode)
        if mode and self.clears:
            self.kept, self.table = None, {}
            self.__dict__.pop("late", None)
        return self

    def factor(self) -> Tensor:
        """What the units are multiplied with. [16]"""
        if self.training:
            return self.scale[1]
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
        return self.o(self.b(self.a(x).relu() * self.factor()).relu())


@torch.no_grad()
@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("place", ["attribute", "entry", "pair", "late"])
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
@pytest.mark.parametrize("place", ["attribute", "entry", "pair", "late"])
def test_what_the_model_that_a_file_is_loaded_into_keeps_is_made_anew(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Cached(place).double().eval()
    graph = sc.trace(model, INPUTS)
    small = sc.apply(model, random_plan(graph, 0.5, 0), "module", graph=graph)
    model(INPUTS)
    loaded = sc.load(sc.save(small, tmp_path / "small"), lambda: model)
    torch.testing.assert_close(loaded(INPUTS), small(INPUTS))


@pytest.mark.parametrize("place", ["attribute", "entry", "pair", "late"])
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


def test_a_table_that_is_made_for_another_size_alone_stays() -> None:
    """As the anchors of YOLO: without them, and with the size that they were made for, the model fails."""

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
                assert small.anchors is not None
        assert sc.verify(model, small, plan).proven
