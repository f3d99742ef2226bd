"""Tensors that no state dict holds: a loaded model has those of the saved one, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.targets.units.plans import plan_of

PLACES = ["attribute", "list", "table", "buffer", "integers"]
KEEP = {"a": np.arange(12) % 3 > 0}
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Fourier(nn.Module):
    """Random features in front of two layers, kept in some place, beside what the outputs do not hang on."""

    def __init__(self, place: str) -> None:
        super().__init__()
        features: Tensor = torch.randn(6, 8)
        self.place, self.log, self.last = place, torch.rand(3), torch.rand(4, 12)
        self.kept: Any = features
        if place == "list":
            self.kept = [features, torch.randn(2)]
        if place == "table":
            self.kept = {"of": {"features": features}}
        if place == "integers":
            self.kept = torch.randperm(6).repeat(2)[:8]
        if place == "buffer":
            del self.kept
            self.register_buffer("kept", features, persistent=False)
        self.a, self.o = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]"""
        if self.place == "integers":
            x = x[:, self.kept]
        else:
            kept = {"list": lambda: self.kept[0], "table": lambda: self.kept["of"]["features"]}
            x = (x @ kept.get(self.place, lambda: self.kept)()).sin()
        self.last = self.a(x).relu()
        return self.o(self.last)


def made(place: str, seed: int) -> Fourier:
    torch.manual_seed(seed)
    return Fourier(place).eval()


@torch.no_grad()
@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("place", PLACES)
def test_other_numbers_beside_the_state_dict_are_refused(place: str, form: Any, tmp_path: Path) -> None:
    model = made(place, 0)
    graph = sc.trace(model, X)
    small = sc.apply(model, plan_of(graph, KEEP), form, graph=graph)
    wanted = small(X)
    path = sc.save(small, tmp_path / "small")

    def same() -> nn.Module:
        found = made(place, 0)
        for tensor in (*found.parameters(), found.log, found.last):  # these do not matter
            tensor.zero_()
        return found

    torch.testing.assert_close(sc.load(path, same)(X), wanted)
    with pytest.raises(sc.ArtefactError, match="no artefact holds it"):
        sc.load(path, lambda: made(place, 1))


@torch.no_grad()
def test_numbers_that_differ_by_rounding_are_taken(tmp_path: Path) -> None:
    model = made("buffer", 0)
    graph = sc.trace(model, X)
    small = sc.apply(model, plan_of(graph, KEEP), "module", graph=graph).bfloat16()
    loaded = sc.load(sc.save(small, tmp_path / "small"), lambda: made("buffer", 0))
    torch.testing.assert_close(loaded.bfloat16()(X.bfloat16()), small(X.bfloat16()))


@torch.no_grad()
def test_what_calls_leave_behind_is_taken(tmp_path: Path) -> None:
    """A state that each call changes is as in a new model."""

    class Remembers(Fourier):
        def __init__(self) -> None:
            super().__init__("buffer")
            self.state = torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x) + self.state
            self.state = out.mean(0)
            return out

    def made_again() -> nn.Module:
        torch.manual_seed(0)
        return Remembers().eval()

    model = made_again()
    graph = sc.trace(model, X)
    small = sc.apply(model, plan_of(graph, KEEP), "module", graph=graph)
    wanted = small(X)
    assert bool(small.state.any())
    torch.testing.assert_close(sc.load(sc.save(small, tmp_path / "small"), made_again)(X), wanted)
