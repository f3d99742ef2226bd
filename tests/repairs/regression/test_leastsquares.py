"""Ridge regression from sums, against numpy and literal formulas."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.repairs.regression.leastsquares import DEFAULT_DAMPING, Problem, Sums, descend, fit, total


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(x: Tensor, y: Tensor, start: Tensor, damping: float, intercept: bool) -> tuple[Tensor, Tensor]:
    """Stacked rows, solved by numpy's lstsq: the data, and one row a coefficient for the damping."""
    a, b = x.numpy(), y.numpy()
    mean_a, mean_b = (v.mean(0) if intercept else np.zeros(v.shape[1]) for v in (a, b))
    a, b = a - mean_a, b - mean_b
    ridge = math.sqrt(damping * (a**2).sum(0).mean())
    rows = np.vstack([a, ridge * np.eye(a.shape[1])])
    wanted = np.vstack([b, ridge * start.numpy()])
    weight = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return torch.tensor(weight), torch.tensor(mean_b - mean_a @ weight)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("damping", [1e-6, 0.1, 3.0])
@pytest.mark.parametrize("count", [3, 40])
def test_the_solution_is_that_of_stacked_least_squares(intercept: bool, damping: float, count: int) -> None:
    x, y, start = random(2, count, 5) + 0.7, random(2, count, 3, seed=1), random(2, 5, 3, seed=2)
    sums = Sums.of(x, y)
    found = Problem(sums, start, intercept).solve(damping)
    assert found is not None
    for group in range(2):
        weight, bias = literal(x[group], y[group], start[group], damping, intercept)
        torch.testing.assert_close(found[group], weight, rtol=1e-8, atol=1e-8)
        if intercept:
            torch.testing.assert_close(sums.intercept(found)[group], bias, rtol=1e-8, atol=1e-8)


def test_sums_add_up_and_the_loss_is_that_of_the_residuals() -> None:
    x, y, weight, bias = random(2, 20, 4), random(2, 20, 3, seed=1), random(2, 4, 3, seed=2), random(2, 3)
    whole = Sums.of(x, y)
    first, rest = Sums.of(x[:, :7], y[:, :7]), Sums.of(x[:, 7:], y[:, 7:])
    few = Sums.of(x[:, :2], y[:, :2]) + Sums.of(x[:, 2:4], y[:, 2:4])
    assert few.rows is not None  # no more than there are columns
    assert whole.rows is None
    for made in (first + rest, total([few, Sums.of(x[:, 4:], y[:, 4:])])):
        assert made.count == 20
        for mine, theirs in zip(made.multiplied(), whole.multiplied(), strict=True):
            torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(made.yy, whole.yy)
    left = (x[:, :4] @ weight - y[:, :4]).square().sum()
    assert few.loss(weight, None) == pytest.approx(float(left))
    for b in (None, bias):
        left = x @ weight - y if b is None else x @ weight + b[:, None] - y
        assert whole.loss(weight, b) == pytest.approx(float(left.square().sum()))
    assert not Sums.of(x * math.nan, y).finite()


def test_few_rows_are_solved_like_their_products() -> None:
    x, y, start = random(2, 5, 7), random(2, 5, 3, seed=1), random(2, 7, 3, seed=2)
    free = random(2, 7, 3, seed=4) > 0
    sums = Sums.of(x, y)
    as_products = dataclasses.replace(sums, rows=None, products=sums.multiplied())
    for intercept in (True, False):
        for mask in (None, free):
            ours, theirs = (Problem(s, start, intercept, mask).solve(0.1) for s in (sums, as_products))
            torch.testing.assert_close(ours, theirs)


def test_entries_that_are_not_free_stay_and_the_others_are_best_given_those() -> None:
    x, y = random(1, 30, 4), random(1, 30, 3, seed=1)
    start = random(1, 4, 3, seed=2)
    free = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)[None]
    start = start * free
    found = Problem(Sums.of(x, y), start, True, free).solve(1e-9)
    assert found is not None
    assert (found[~free] == 0).all()
    for output in range(3):
        columns = free[0, :, output]
        a = np.column_stack([x[0][:, columns].numpy(), np.ones(30)])
        wanted = np.linalg.lstsq(a, y[0, :, output].numpy(), rcond=None)[0][:-1]
        torch.testing.assert_close(found[0][columns, output], torch.tensor(wanted), rtol=1e-6, atol=1e-6)


def parts(x: Tensor, y: Tensor, count: int = 4) -> list[Sums]:
    return [Sums.of(a, b) for a, b in zip(x.chunk(count, 1), y.chunk(count, 1), strict=True)]


def test_clear_data_are_followed_and_noise_is_not() -> None:
    truth, start = random(1, 6, 2, seed=3), random(1, 6, 2, seed=4)
    x = random(1, 80, 6)
    exact = fit(parts(x, x @ truth + 0.5), start, torch.zeros(1, 2, dtype=torch.float64), True)
    torch.testing.assert_close(exact.weight, truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact.bias, torch.full((1, 2), 0.5, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert exact.after < 1e-10 < exact.before
    few = random(1, 8, 6)
    noisy = few @ start + 30 * random(1, 8, 2, seed=5)
    kept = fit(parts(few, noisy), start, None, False)
    assert kept.damping >= 0.1
    plain = literal(few[0], noisy[0], start[0], 0, False)[0]
    assert (kept.weight - start).norm() < (plain - start).norm() / 3


def test_the_damping_is_the_one_that_predicts_best_what_was_left_out() -> None:
    x, y, start = random(1, 24, 6), random(1, 24, 2, seed=1), random(1, 6, 2, seed=2)
    candidates = (1e-3, 1e-1, 10.0)
    errors = {}
    for damping in candidates:
        errors[damping] = 0.0
        for k in range(4):
            held = torch.arange(24) // 6 == k
            weight, bias = literal(x[0, ~held], y[0, ~held], start[0], damping, True)
            errors[damping] += float((x[0, held] @ weight + bias - y[0, held]).square().sum())
    found = fit(parts(x, y), start, None, True, None, candidates)
    best = min(errors, key=lambda d: errors[d])
    scatter = float((y - y.mean(1, keepdim=True)).square().sum())
    kept = sum(
        float((x[0, h] @ start[0] + (y[0, ~h] - x[0, ~h] @ start[0]).mean(0) - y[0, h]).square().sum())
        for h in (torch.arange(24) // 6 == k for k in range(4))
    )
    assert found.after == pytest.approx(min(*errors.values(), kept) / scatter)
    assert found.damping == (best if errors[best] < kept else math.inf)


def test_degenerate_data_change_little_and_never_give_what_is_not_a_number() -> None:
    start, bias = random(1, 5, 2), random(1, 2)
    dead = fit(parts(torch.zeros(1, 12, 5).double(), random(1, 12, 2)), start, bias, True)
    torch.testing.assert_close(dead.weight, start)
    same = random(1, 12, 1).expand(1, 12, 5)
    found = fit(parts(same, random(1, 12, 2, seed=1)), start, bias, True)
    assert torch.isfinite(found.weight).all()
    assert found.weight.norm() < 10 * start.norm()
    single = fit([Sums.of(random(1, 3, 5), random(1, 3, 2))], start, bias, True)
    assert single.damping == DEFAULT_DAMPING
    assert torch.isfinite(single.weight).all()
    for count in (4, 9):
        nothing = Sums.of(torch.zeros(1, count, 5).double(), torch.zeros(1, count, 2).double())
        assert Problem(nothing, start, True).solve(0.0) is None


def test_nothing_changes_where_nothing_predicts_better() -> None:
    """The weight and bias that came in are right on every part."""
    x, start, bias = random(1, 40, 4), random(1, 4, 2), random(1, 2)
    found = fit(parts(x, x @ start + bias[:, None]), start, bias, True)
    torch.testing.assert_close(found.weight, start, rtol=1e-9, atol=1e-9)
    assert found.bias is not None
    torch.testing.assert_close(found.bias, bias, rtol=1e-9, atol=1e-9)


def test_descent_finds_the_lowest_of_a_valley_and_few_candidates_are_tried() -> None:
    candidates = [10.0**k for k in range(-5, 5)]
    for lowest in candidates:
        tried = []

        def error(damping: float, lowest: float = lowest, tried: list[float] = tried) -> float:
            tried.append(damping)
            return abs(math.log10(damping / lowest)) + 1

        assert descend(error, candidates) == (lowest, 1.0)
        assert len(tried) == len(set(tried)) <= 3 + abs(candidates.index(lowest) - 5)


def test_descent_leaves_where_there_is_no_solution() -> None:
    assert descend(lambda d: math.inf if d < 4 else d, [1.0, 2.0, 3.0, 4.0, 5.0]) == (4.0, 4.0)
    assert descend(lambda d: math.inf, [1.0, 2.0, 3.0]) == (3.0, math.inf)
    assert descend(lambda d: math.nan, [1.0, 2.0, 3.0]) == (3.0, math.inf)  # a fold without data
    assert descend(lambda d: 1.0, [1.0, 2.0, 3.0])[1] == 1.0
