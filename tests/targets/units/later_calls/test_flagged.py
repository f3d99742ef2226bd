"""Flags set on a pruned model after the trace: it computes what the masked dense model does, or refuses."""

from __future__ import annotations

import copy
import enum
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.targets.units.later_calls.flagged import Refused, flag_values


class Kind(enum.Enum):
    PLAIN = 1
    OTHER = 2


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalise": lambda h: F.normalize(h, dim=-1),
    "softmax": lambda h: h.softmax(-1),
    "centre": lambda h: h - h.mean(-1, keepdim=True),
    "sort": lambda h: h.sort(-1).values,
    "roll": lambda h: h.roll(1, -1),
    "view": lambda h: h.view(-1, 3, 4).transpose(1, 2).reshape(len(h), 12),
    "halves": lambda h: torch.cat([h[:, :6] * 2, h[:, 6:]], 1),
    "ramp": lambda h: h + torch.arange(h.shape[-1]),
    "flip": lambda h: h.flip(-1),
    "tanh": torch.tanh,
    "clip": lambda h: h.clamp(max=0.5),
    "noise": lambda h: F.dropout(h, 0.5, training=True),
}
MIXING = {"normalise", "softmax", "centre", "sort", "roll", "view", "halves", "ramp"}
"""The operators that need removed units, or their places."""


class Slots:
    __slots__ = ("flag",)

    def __init__(self) -> None:
        self.flag = False


class Inner(nn.Module):
    flag = False  # of the class

    def __init__(self, operator: str, where: str) -> None:
        super().__init__()
        self.operator, self.where = OPERATORS[operator], where
        self.mode, self.kind, self.level = "plain", Kind.PLAIN, 0
        self.limit: float | None = 3.0
        self.slots = Slots()
        self.config = SimpleNamespace(deep=SimpleNamespace(flag=False), flag=False)

    def asks(self) -> bool:
        """Whether the flag is set, wherever it is."""
        found = {
            "class": lambda: self.flag,
            "mode": lambda: self.mode == "other",
            "kind": lambda: self.kind is Kind.OTHER,
            "level": lambda: self.level > 2,
            "truth": lambda: bool(self.level),
            "none": lambda: self.limit is None,
            "config": lambda: self.config.flag,
            "deep": lambda: self.config.deep.flag,
            "slots": lambda: self.slots.flag,
        }
        return bool(found[self.where]())

    def forward(self, h: Tensor) -> Tensor:
        """Of [batch, 12]."""
        return self.operator(h) if self.asks() else h


SET: dict[str, Callable[[Any], None]] = {
    "class": lambda m: setattr(m, "flag", True),
    "mode": lambda m: setattr(m, "mode", "other"),
    "kind": lambda m: setattr(m, "kind", Kind.OTHER),
    "level": lambda m: setattr(m, "level", 7),
    "truth": lambda m: setattr(m, "level", 1),
    "none": lambda m: setattr(m, "limit", None),
    "config": lambda m: setattr(m.config, "flag", True),
    "deep": lambda m: setattr(m.config.deep, "flag", True),
    "slots": lambda m: setattr(m.slots, "flag", True),
}


class Net(nn.Module):
    def __init__(self, operator: str, where: str) -> None:
        super().__init__()
        self.up, self.inner, self.mid = nn.Linear(6, 12), Inner(operator, where), nn.Linear(12, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        return self.out(self.mid(self.inner(self.up(x).relu())).relu())


INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()


def network(operator: str, where: str) -> Net:
    torch.manual_seed(0)
    return Net(operator, where).double().eval()


def pruned(model: nn.Module, form: Any = "module") -> tuple[Any, Any, Any, Any]:
    """The graph, the plan, and the model in this form and masked."""
    graph = sc.trace(model, INPUTS)
    keep = {g.name: np.arange(g.size) % 3 != 1 for g in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="every third")
    small, masked = (sc.apply(model, plan, f, graph=graph) for f in (form, "masked"))
    return graph, plan, small, masked


def output(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(INPUTS)


@pytest.mark.parametrize("where", SET)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_module_is_right_or_refuses_with_the_flag_and_the_line(operator: str, where: str) -> None:
    _, _, small, masked = pruned(network(operator, where))
    torch.testing.assert_close(output(small), output(masked))
    for model in (small, masked):
        SET[where](model.inner)
    if operator in MIXING:
        names = {"class": "flag", "truth": "level", "none": "limit", "config": "config.flag"}
        name = {"deep": "config.deep.flag", "slots": "slots.flag"}.get(where, names.get(where, where))
        with pytest.raises(sc.SecateurError, match=rf"expected {name} of module '?inner") as raised:
            output(small)
        assert len(str(raised.value)) < 600
        with pytest.raises(sc.SecateurError, match=f"expected {name}"):
            small.inner(torch.zeros(1, 8).double())
    else:
        wanted = output(masked)
        assert not torch.equal(wanted, output(copy.deepcopy(masked).apply(_plain)))
        if operator != "noise":  # which draws for as many units as there are
            torch.testing.assert_close(output(small), wanted)


def _plain(module: nn.Module) -> None:
    if isinstance(module, Inner):
        module.operator = nn.Identity()


class Own(nn.Module):
    """Reads its flags itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.out = nn.Linear(6, 12), nn.Dropout(0.1), nn.Linear(12, 3)
        self.pooled, self.scale, self.calls = False, 2.0, 0
        self.act: nn.Module = nn.ReLU()
        self.kind, self.bend = Kind.PLAIN, torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        h = self.bend(self.act(self.drop(self.up(x))) * self.scale)
        if self.pooled or self.kind is Kind.OTHER:
            h = h.softmax(-1)
        return self.out(h)


@pytest.mark.parametrize("copied", [False, True])
def test_attributes_of_a_captured_program(copied: bool) -> None:
    torch.manual_seed(0)
    _, _, small, _ = pruned(Own().double().eval(), "graph")
    if copied:
        small = copy.deepcopy(small)
    others = {"pooled": True, "scale": 3.0, "act": nn.GELU(), "kind": Kind.OTHER, "bend": torch.sin}
    for name, value in others.items():
        with pytest.raises(sc.ApplyError, match=f"{name}: expected it to stay"):
            setattr(small, name, value)
    small.pooled, small.scale, small.note = False, 2.0, "mine"
    assert small.train().training
    assert small.note == "mine"
    with pytest.raises(sc.ApplyError, match=r"p: expected it to stay 0\.1"):
        small.drop.p = 0.5


def test_a_flag_set_between_trace_and_apply_is_refused_in_words() -> None:
    torch.manual_seed(0)
    model = Own().double().eval()
    graph, plan, *_ = pruned(model)
    model.pooled, model.calls = True, 4
    for form in ("auto", "module", "graph"):
        with pytest.raises(sc.ApplyError, match=r"model.pooled = True, then False.*Trace the model again"):
            sc.apply(model, plan, form, graph=graph)
    model.pooled = False
    model.kind = Kind.OTHER
    with pytest.raises(sc.ApplyError, match=r"model.kind = <Kind.OTHER: 2>, then <Kind.PLAIN: 1>"):
        sc.apply(model, plan, graph=graph)
    model.kind = Kind.PLAIN  # a counter makes no difference
    assert sc.record_of(sc.apply(model, plan, graph=graph)).form == "module"


@pytest.mark.parametrize("way", ["save", "pickle", "copy", "again"])
def test_a_refusal_outlives_the_model_object(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Own().double().eval()
    _, _, small, _ = pruned(model)
    assert sc.record_of(small).flags[0].known == ("False",)
    assert "model.pooled other than False" in sc.record_of(small).note
    if way == "save":
        small = sc.load(sc.save(small, tmp_path / "small"), lambda: Own().double().eval())
        assert sc.record_of(small).flags[0].chain == ("pooled",)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(small, file)
        small = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    elif way == "copy":
        small = copy.deepcopy(small)
    else:
        _, _, small, _ = pruned(small)
    small.pooled = True
    with pytest.raises(sc.InputError, match="expected pooled of module 'model' to be False"):
        output(small)
    small.pooled = False
    assert torch.isfinite(output(small)).all()


def test_a_flag_that_only_training_reads() -> None:
    class Trained(Own):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).relu()
            return self.out(h.softmax(-1) if self.training and self.pooled else h)

    torch.manual_seed(0)
    _, _, small, _ = pruned(Trained().double().eval())
    small.pooled = True
    with pytest.raises(sc.InputError, match="expected pooled"):
        small.train()(INPUTS)


def test_each_module_keeps_its_own_value() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Net("normalise", "level"), Net("softmax", "level")
            self.second.inner.level = 7

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    torch.manual_seed(0)
    _, _, small, masked = pruned(Steps().double().eval())
    torch.testing.assert_close(output(small), output(masked))
    small.first.inner.level = 2
    torch.testing.assert_close(output(small), output(masked))
    small.first.inner.level = 7
    with pytest.raises(sc.InputError, match=r"expected level of module 'first\.inner' to be 0"):
        output(small)


def test_flags_are_tried_without_a_trace_in_the_model() -> None:
    torch.manual_seed(0)
    model = Own().double().eval()
    before = dict(vars(model))
    found = flag_values(model, sc.trace(model, INPUTS))
    tried = {str(switch.flags[0]) for switch in found if switch.cases}
    assert tried == {"model.pooled = True", "model.kind = <Kind.OTHER: 2>"}
    assert "softmax" in found[0].line
    assert vars(model) == before
    assert str(Refused("a.b", ("c",), ("1", "2"))) == "model.a.b.c other than 1 or 2"


CONDITIONS: dict[str, Callable[[Any, Tensor, bool], bool]] = {
    "size that is compared anyway": lambda m, x, crowd: m.pooled and crowd,
    "size that is compared with the flag alone": lambda m, x, crowd: m.pooled and len(x) > 7,
    "two flags, and a size that is compared anyway": lambda m, x, crowd: m.pooled and m.shifted and crowd,
    "two flags, and a size that is compared with both alone": (
        lambda m, x, crowd: m.pooled and m.shifted and len(x) > 7
    ),
    "another size if it is set": lambda m, x, crowd: len(x) > (7 if m.pooled else 9**9),
}


class Crowded(nn.Module):
    """Under a condition on flags and the number of samples, it mixes units."""

    def __init__(self, condition: str) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(6, 12), nn.Linear(12, 3)
        self.condition = CONDITIONS[condition]
        self.pooled = self.shifted = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        crowd = x.shape[0] > 7
        return self.out(h.softmax(-1) if self.condition(self, x, crowd) else h)


CALLS: list[int] = []


@pytest.mark.parametrize("condition", CONDITIONS)
def test_flags_that_matter_at_other_sizes(condition: str) -> None:
    torch.manual_seed(0)
    _, _, small, masked = pruned(Crowded(condition).double().eval())
    crowd = torch.randn(20, 6).double()
    torch.testing.assert_close(small(crowd), masked(crowd))
    small.pooled = True
    if condition.startswith("two"):
        torch.testing.assert_close(small(crowd), masked(crowd))
        small.shifted = True
    with pytest.raises(sc.InputError, match=r"expected (pooled|shifted) of"):
        small(crowd)


def test_comparisons_that_do_not_depend_on_a_flag_are_searched_once() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(6, 12), nn.Linear(12, 3)
            self.a = self.b = self.c = self.d = False

        def forward(self, x: Tensor) -> Tensor:
            CALLS.append(len(x))
            h = self.up(x).relu()
            for odd in (9, 15, 25, 37):
                if 2 * x.shape[0] == odd:  # of which the outcome never changes
                    h = h * 2
            return self.out(h + 1 if self.a or self.b or self.c or self.d else h)

    model = Asking().double().eval()
    graph = sc.trace(model, INPUTS)
    CALLS.clear()
    tried = len(flag_values(model, graph))
    assert tried == 4 + 6  # each, and each pair
    assert len(CALLS) < 9 * tried
