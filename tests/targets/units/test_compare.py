"""The helper that every proof rests on, also where it has to say no."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.targets.units.compare import relative_difference, run, run_in_double
from tests.graph.tiny import Calls

NUMBERS = st.sampled_from([0.0, -0.5, 1.0, 3.0, -9999.0, 1e4, -1e9, 2e9, math.inf, -math.inf, math.nan])
A = torch.tensor([1.0, -4.0, 2.0])


def test_relative_to_the_largest_of_the_reference() -> None:
    assert relative_difference([A + torch.tensor([0.0, 0.5, 1.0])], [A]) == 0.25
    assert relative_difference([A, 2 * A], [A, A]) == 1.0
    assert relative_difference([A.clone()], [A]) == 0.0
    assert relative_difference([], []) == 0.0


def test_a_reference_of_zeros_is_compared_absolutely() -> None:
    zeros = torch.zeros(3)
    assert relative_difference([zeros], [zeros]) == 0.0
    assert relative_difference([zeros + 0.25], [zeros]) == 0.25


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([A], [A, A]),
        ([A, A], [A]),
        ([], [A]),
        ([A], [A[None]]),
        ([A[:2]], [A]),
        ([torch.tensor([1.0, math.nan])], [torch.tensor([1.0, 2.0])]),
        ([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, math.inf])]),
        ([torch.complex(A, A)], [A]),
    ],
    ids=["fewer", "more", "none", "rank", "shape", "nan", "inf", "complex"],
)
def test_what_cannot_be_compared_differs_without_limit(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert relative_difference(ours, theirs) == math.inf


def test_masks_of_infinity_are_equal() -> None:
    mask = torch.tensor([0.0, -math.inf, 2.0])
    assert relative_difference([mask.clone()], [mask]) == 0.0
    assert relative_difference([mask + torch.tensor([0.0, 0.0, 1.0])], [mask]) == 0.5
    assert relative_difference([torch.full((2,), math.nan)], [torch.full((2,), math.nan)]) == 0.0


def test_whole_numbers_truth_values_and_complex_numbers_count() -> None:
    assert relative_difference([torch.tensor([3, 4])], [torch.tensor([3, 5])]) == 0.2
    assert relative_difference([torch.tensor([True])], [torch.tensor([False])]) == 1.0
    z = torch.complex(torch.tensor([1.0]), torch.tensor([2.0]))
    assert relative_difference([z.clone()], [z]) == 0.0
    assert relative_difference([z.conj()], [z]) == 2.0  # 4i of at most 2i
    assert relative_difference([torch.zeros(0)], [torch.zeros(0)]) == 0.0


def literal(a: Tensor, b: Tensor) -> float:
    """The relative difference of two outputs, number by number."""
    scale = most = 0.0
    for x, y in zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True):
        if math.isfinite(x) != math.isfinite(y):
            return math.inf
        if math.isfinite(y) and not (x == y and abs(y) >= 1e4):
            scale, most = max(scale, abs(y)), max(most, abs(x - y))
    return most / scale if scale else most


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans()), min_size=1, max_size=6))
def test_as_number_by_number(pairs: list[tuple[float, float, bool]]) -> None:
    a = torch.tensor([x for x, _, _ in pairs], dtype=torch.float64)
    b = torch.tensor([x if same else y for x, y, same in pairs], dtype=torch.float64)
    assert relative_difference([a], [b]) == literal(a, b)


def test_run_flattens_and_restores() -> None:
    net = Calls(lambda m, x: {"y": [m.a(x) * 2, 3], "n": (m.a(x) > 0).sum()}, a=nn.Dropout(0.5))
    net.train()
    y, n = run(net, (torch.ones(4),), {})
    assert (y.tolist(), n.item()) == ([2.0] * 4, 4)
    assert net.training
    assert net.a.training


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x).float().sigmoid(),
        lambda m, x: torch.softmax(m.a(x), -1, dtype=torch.float32),
        lambda m, x: (m.a(x) + torch.zeros(4, dtype=torch.float16)).to(torch.bfloat16),
        lambda m, x: m.a(x) @ torch.eye(4) + torch.tensor([0.1]),
        lambda m, x: m.a(x.half().float()),
    ],
    ids=["float", "softmax", "to", "default", "input"],
)
def test_run_in_double_whatever_the_model_casts_to(forward: object) -> None:
    net = Calls(forward, a=nn.Linear(3, 4))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    x = torch.rand(2, 3)
    (y,) = run_in_double(net, (x,), {})
    assert y.dtype == torch.float64
    with torch.no_grad():
        exact = x.double() @ net.a.weight.double().t() + net.a.bias.double()
    if "sigmoid" in forward.__code__.co_names:
        assert float((y - exact.sigmoid()).abs().max()) < 1e-15
    assert torch.get_default_dtype() == torch.float32
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_the_default_type_is_restored_after_a_failure() -> None:
    with pytest.raises(RuntimeError):
        run_in_double(nn.Linear(3, 2), (torch.zeros(2, 4),), {})
    assert torch.get_default_dtype() == torch.float32
