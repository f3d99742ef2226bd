"""Rehearsals: they show what a capture in another dtype would, and a capture is made where they differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.targets.units.graph_form import variants
from secateur.targets.units.graph_form.rehearsal import rehearsed
from secateur.targets.units.graph_form.traced import Traced
from secateur.targets.units.graph_form.variants import Facts

BATCH = 4


class Around(nn.Module):
    """Two layers, and a function between them that may look at the dtype or the mode."""

    def __init__(self, between: Callable[[Around, Tensor], Tensor]) -> None:
        super().__init__()
        self.between, self.a, self.b, self.o = between, nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.between(self, self.a(x).relu()) + self.b(x))


def single(h: Tensor) -> bool:
    return h.dtype is torch.float32


WAYS: dict[str, Callable[[Around, Tensor], Tensor]] = {
    "nothing": lambda model, h: h,
    "other function": lambda model, h: h.tanh() if single(h) else h.sigmoid(),
    "other number": lambda model, h: h * (2 if single(h) else 3),
    "other operand": lambda model, h: h + (h if single(h) else h.tanh() * 0),
    "other slice": lambda model, h: h[:, : 8 if single(h) else 7].sum(1, keepdim=True),
    "other parameter": lambda model, h: h + (model.a.bias if single(h) else model.b.bias),
    "smallest number": lambda model, h: h.clamp(min=torch.finfo(h.dtype).min / 2),
    "conversion": lambda model, h: h.float().to(model.a.weight.dtype),
    "constant": lambda model, h: h * torch.tensor(0.1, dtype=h.dtype),
    "autocast": lambda model, h: h.tanh() if torch.is_autocast_enabled("cpu") else h,
    "training": lambda model, h: h.tanh() if model.training else h,
    "batch norm": lambda model, h: model.norm(h),
    "dropout": lambda model, h: nn.functional.dropout(h, 0.5, model.training),
    "constant of another dtype": lambda model, h: h @ torch.ones(8, 8),
}


def facts(model: nn.Module) -> Facts:
    return Traced(model, sc.trace(model, torch.randn(BATCH, 6))).captured.facts


def plain(found: Facts) -> dict[str, object]:
    """Facts that can be compared: constants as lists."""
    held = {name: (source, tensor.tolist()) for name, (source, tensor) in found.constants.items()}
    return {**vars(found), "constants": held}


ALIKE = {"nothing", "batch norm", "dropout", "autocast", "training"}
"""Those that run in float64 too, and make the same calls there."""


@pytest.mark.parametrize("way", WAYS)
def test_rehearsals_differ_where_the_model_looks_at_the_dtype(way: str) -> None:
    model, x = Around(WAYS[way]).eval(), torch.randn(BATCH, 6)
    one, other = rehearsed(model, ((x,), {})), rehearsed(model.double(), ((x.double(),), {}))
    assert one is not None
    assert (other is not None and one.calls == other.calls) is (way in ALIKE)


@pytest.mark.parametrize("way", ["training", "dropout", "batch norm", "autocast"])
def test_rehearsals_differ_where_the_model_looks_at_the_mode(way: str) -> None:
    model, given = Around(WAYS[way]).eval(), ((torch.randn(BATCH, 6),), {})
    one = rehearsed(model, given)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        other = rehearsed(model, given, training=way != "autocast")
    assert one is not None
    assert other is not None
    assert one.calls != other.calls


@pytest.mark.parametrize("way", ["nothing", "conversion", "constant", "constant of another dtype"])
def test_the_facts_are_those_of_captures_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Around(WAYS[way]).eval()
    found = facts(model)
    with monkeypatch.context() as alone:
        alone.setattr(variants, "rehearsed", lambda *args, **kwargs: None)
        wanted = facts(model)
    assert plain(found) == plain(wanted)
    assert (len(found.states) < 5) is (way == "constant of another dtype")


def test_where_all_rehearsals_are_alike_one_sample_alone_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, captured = Around(WAYS["nothing"]).eval(), []
    graph = sc.trace(model, torch.randn(BATCH, 6))
    original = variants.capture

    def capture(*args: object, **kwargs: object) -> object:
        captured.append(kwargs["exact"])
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(variants, "capture", capture)
    known = Traced(model, graph).captured.facts
    assert captured == [True]
    assert len(known.states) == 5  # four dtypes, and autocast


def test_a_model_that_fails_has_no_rehearsal() -> None:
    model = Around(lambda model, h: h * float(h.sum())).eval()
    assert rehearsed(model, ((torch.randn(BATCH, 6),), {})) is None


def test_a_rehearsal_leaves_the_model_as_it_was() -> None:
    model = Around(WAYS["batch norm"]).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert rehearsed(model, ((torch.randn(BATCH, 6),), {}), training=True) is not None
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
