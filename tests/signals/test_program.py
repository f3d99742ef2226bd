from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import CalibrationError
from secateur.graph.programs import Programs
from secateur.graph.trace import trace
from secateur.signals.program import CapturedModel
from tests.helpers.models import TOPOLOGIES, build


class Keywords(nn.Module):
    """Takes a nested argument, a keyword and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, pair, *, scale=None, double=False):
        x = self.b(torch.relu(self.a(pair[0] + pair[1])))
        x = x if scale is None else x * scale
        return {"out": [2 * x if double else x]}


class WritesEverything(nn.Module):
    """Writes into its input, a buffer, and the output of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        x.mul_(2)
        return self.b(self.a(x).relu_()) + self.calls


@pytest.mark.parametrize(
    "name", ["residual", "gru", "tied_linear", "dict_output", "multi_input", "functional"]
)
def test_computes_what_the_model_does(name: str) -> None:
    model, inputs = build(name), TOPOLOGIES[name].inputs
    run = CapturedModel(trace(model, inputs(3, torch.float64)).programs)
    for batch in (2, 5):
        x = inputs(batch, torch.float64, 1)
        with torch.no_grad():
            expected, got = model(*x), run(*x)
        assert type(got) is type(expected)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_nested_arguments_keywords_and_outputs() -> None:
    model = Keywords().eval()
    program = torch.export.export(
        model, ((torch.randn(2, 3), torch.randn(2, 3)),), {"scale": torch.tensor(3.0), "double": True}
    )
    run = CapturedModel(Programs(program))
    pair = (torch.randn(2, 3), torch.randn(2, 3))
    got = run(pair, double=True, scale=torch.tensor(5.0))
    torch.testing.assert_close(got, model(pair, double=True, scale=torch.tensor(5.0)))
    with pytest.raises(
        CalibrationError, match=r"input double: expected True, which .* captured with, got False"
    ):
        run(pair, scale=torch.tensor(5.0), double=False)
    with pytest.raises(
        CalibrationError, match="expected 1 positional and keywords scale, double, got 1 positional"
    ):
        run(pair)


def test_arguments_by_name() -> None:
    model = build("multi_input", torch.float32)
    image, vector = TOPOLOGIES["multi_input"].inputs(3)
    run = CapturedModel(trace(model, (image, vector)).programs)
    expected = model(image, vector)
    torch.testing.assert_close(run(vector=vector, image=image), expected)


def test_what_the_program_writes_is_a_copy() -> None:
    model = WritesEverything().eval()
    program = torch.export.export(model, (torch.randn(2, 3),))
    x = torch.randn(2, 3)
    before, calls = x.clone(), model.calls.clone()
    run = CapturedModel(Programs(program), ("a.weight",))
    first, second = run(x), run(x)
    assert torch.equal(first, second)
    assert torch.equal(x, before)
    assert torch.equal(model.calls, calls)
    expected = model(x.clone())
    torch.testing.assert_close(first, expected)
    assert first.requires_grad


def test_aliases_share_storage_but_not_gradients() -> None:
    model = build("tied_linear")
    run = CapturedModel(trace(model, torch.randn(2, 6, dtype=torch.float64)).programs, ("first.weight",))
    assert run.tensors["first.weight"].data_ptr() == model.first.weight.data_ptr()
    assert run.tensors["second.weight"] is run.tensors["first.weight"]
    run(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    assert run.tensors["first.weight"].grad is not None
    assert model.first.weight.grad is None
    assert not run.tensors["head.weight"].requires_grad


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(4, 3, 9, 8),
            r"input input: expected shape \[any, 3, 8, 8\], got \[4, 3, 9, 8\].* Pass samples",
        ),
        (torch.zeros(4, 3, 8), r"expected shape \[any, 3, 8, 8\], got \[4, 3, 8\]"),
        (torch.zeros(4, 3, 8, 8).double(), "expected torch.float32, got torch.float64. Convert"),
        ("words", r"expected a tensor \[any, 3, 8, 8\], got str"),
    ],
)
def test_wrong_inputs(x: object, message: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 2))
    run = CapturedModel(trace(net, torch.zeros(2, 3, 8, 8)).programs)
    with pytest.raises(CalibrationError, match=message):
        run(x)


def test_a_batch_size_that_was_captured_fixed() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    program = torch.export.export(net, (torch.zeros(4, 3),))
    run = CapturedModel(Programs(program))
    assert run(torch.zeros(4, 3)).shape == (4, 2)
    with pytest.raises(CalibrationError, match=r"expected shape \[4, 3\], got \[2, 3\]"):
        run(torch.zeros(2, 3))
    x = torch.randn(2, 3)
    torch.testing.assert_close(CapturedModel(Programs(program, net))(x), net(x))
