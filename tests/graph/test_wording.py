"""The sentence on which sizes may change: every axis is in it, once, and it says what to do."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.graph.inputs import FixedAxis, InputSpec, OpenAxis
from secateur.graph.wording import CHOICES
from tests.graph.tiny import Calls


def sentence_of(spec: InputSpec) -> str:
    """The sentence, which is one."""
    text = spec.sentence()
    assert text.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", text)
    assert "\n" not in text
    return text


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


class Tagger(nn.Module):
    """Reads ids and a mask of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(self.table(ids) * mask[..., None]).relu())


def test_a_network_for_pictures() -> None:
    assert sentence_of(sc.trace(pictures(), torch.randn(4, 3, 8, 8)).inputs) == (
        "You may change the batch size (axis 0 of input: 4 and 1 tried), axis 2 of input (8 and 5 tried) and "
        "axis 3 of input (8 and 7 tried), alone or all at once, to sizes that the dense model takes; you "
        "must keep axis 1 of input at 3 (the dense model failed at the others tried)."
    )


def test_a_language_model() -> None:
    inputs = {"ids": torch.randint(0, 20, (2, 9)), "mask": torch.ones(2, 9)}
    assert sentence_of(sc.trace(Tagger().eval(), inputs).inputs) == (
        "You may change the batch size (axis 0 of ids and mask: 2 and 3 tried) and axis 1 of ids and mask, "
        "always equal (9 and 4 tried), alone or both at once, to sizes that the dense model takes."
    )


def test_a_line_of_the_users_code_fixes_a_length() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.out(m.inner(x).relu().reshape(len(x), 24))

    model = Calls(forward, inner=nn.Linear(5, 4), out=nn.Linear(24, 3)).eval()
    text = sentence_of(sc.trace(model, torch.randn(2, 6, 5)).inputs)
    assert "axis 1 of" not in text.split("you must keep")[0]
    assert re.search(
        r"axis 1 of \S+( \d)? at 6 .*because of line test_wording.py:\d+, `return m\.out\(", text
    )


def test_axes_that_cannot_vary_together() -> None:
    def forward(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 5 and y.shape[1] != 6:
            raise ValueError("one length at a time")
        return m.net(x).mean(1) + m.net(y).mean(1)

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = sc.trace(Calls(forward, net=net).eval(), (torch.randn(3, 5, 4), torch.randn(3, 6, 4)))
    assert not graph.inputs.together
    assert ", but only one at a time, to sizes" in sentence_of(graph.inputs)
    assert "at once" not in graph.inputs.sentence()


def test_what_was_not_tried_is_to_be_kept() -> None:
    spec = InputSpec.of((torch.zeros(2, 1, 7),), {"y": torch.zeros(2)}, None)
    assert sentence_of(spec) == (
        "It is not known which input sizes may change; you must keep axis 0 of input 0 at 2, axis 1 of "
        "input 0 at 1, axis 2 of input 0 at 7 and axis 0 of y at 2 (no other size was tried)."
    )
    long = sc.trace(pictures(), torch.randn(4, 3, 8, 8), more_inputs=[torch.randn(4, 3, 9, 8)]).inputs
    assert sentence_of(long).startswith(
        "You may change axis 2 of input (8 and 9 tried), the batch size (axis"
    )


def test_a_model_without_tensors_has_a_sentence() -> None:
    assert sentence_of(InputSpec()) == "You may change no input size."


def test_reasons_are_said_once_and_many_axes_are_counted() -> None:
    names = [f"past{i}" for i in range(9)]
    spec = InputSpec.of((), {name: torch.zeros(2, 3, 4) for name in names}).model_copy(
        update={
            "open": (OpenAxis(places=tuple((n, 0) for n in names), size=2, other=3, batch=True),),
            "fixed": (
                FixedAxis(places=tuple((n, 1) for n in names), size=3, reason="no", where="net.py:7: x(3)"),
                FixedAxis(places=tuple((n, 2) for n in names), size=4, reason="no", where="net.py:7: x(3)"),
            ),
        }
    )
    text = sentence_of(spec)
    assert "the batch size (axis 0 of past0, past1, past2, past3 and 5 more: 2 and 3 tried)" in text
    assert text.count("because of line net.py:7, `x(3)`") == 1


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (1, 3, 6, 8)])
def test_every_axis_is_in_the_sentence_once(shape: tuple[int, ...]) -> None:
    text = sc.trace(pictures(), torch.randn(shape)).inputs.sentence()
    assert [text.count(f"axis {axis} of input") for axis in range(4)] == [1, 1, 1, 1]


def test_details_add_what_the_model_said() -> None:
    first, *rest = sc.trace(pictures(), torch.randn(4, 3, 8, 8)).inputs.describe().splitlines()
    assert first == sc.trace(pictures(), torch.randn(4, 3, 8, 8)).inputs.sentence()
    assert rest[0] == CHOICES
    assert len(rest) == 2
    assert rest[1].startswith("fixed: axis 1 of input is 3: RuntimeError: ")
    assert CHOICES in str(sc.trace(pictures(), torch.randn(4, 3, 8, 8)).coverage())
