from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import rankdata

import secateur as sc
from secateur.errors import ScoreError, SettingError
from secateur.graph.trace import trace
from secateur.signals import Magnitude, Product, RankSum, Scores, Wasserstein, score
from secateur.signals.units.combination import parse, with_combinations
from tests.helpers.models import build
from tests.signals.data import labelled

PAIR = st.integers(1, 9).flatmap(
    lambda n: st.tuples(*[arrays(np.float64, n, elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0]))] * 2)
)


@given(PAIR)
def test_product_equals_loops(pair) -> None:
    found = Product("a", "b").combine(pair)
    for j in range(len(pair[0])):
        expected = 1.0
        for vector in pair:
            mean = sum(vector.tolist()) / len(vector)
            expected *= vector[j] / mean if mean else 1.0
        assert found[j] == pytest.approx(expected, rel=1e-12)


@given(PAIR)
def test_rank_sum_equals_scipys_ranks(pair) -> None:
    found = RankSum("a", "b").combine(pair)
    expected = sum((rankdata(v, method="average") - 1) / max(len(v) - 1, 1) for v in pair) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@given(PAIR, st.sampled_from([2.0**-40, 0.25, 2.0**300]))
def test_the_scale_of_a_part_does_not_matter(pair, factor: float) -> None:
    a, b = pair
    np.testing.assert_allclose(
        Product("a", "b").combine([a * factor, b]), Product("a", "b").combine([a, b]), rtol=1e-12
    )


@given(PAIR)
def test_only_the_order_of_a_part_matters_to_rank_sums(pair) -> None:
    a, b = pair
    np.testing.assert_array_equal(
        RankSum("a", "b").combine([np.expm1(a) - 7, b]), RankSum("a", "b").combine([a, b])
    )


@pytest.mark.parametrize("kind", [Product, RankSum])
def test_a_part_that_is_constant_says_nothing(kind) -> None:
    a = np.array([3.0, 1.0, 2.0, 9.0])
    for constant in (0.0, 4.0):
        combined = kind("a", "b").combine([a, np.full(4, constant)])
        assert rankdata(combined).tolist() == rankdata(a).tolist()


def test_names_and_their_precedence() -> None:
    assert parse("a*b+c*d*e") == RankSum(Product("a", "b"), Product("c", "d", "e"))
    for name in ("a*b", "a+b", "a+b*c", "a*b*c+d"):
        assert parse(name).name == name  # type: ignore[union-attr]
    assert parse("a") == "a"
    assert Product(RankSum("a", "b"), Magnitude()).name == "(a+b)*magnitude"
    assert RankSum(Product("a", "b"), "c").name == "a*b+c"


def test_nested_ones_are_computed_from_the_inside() -> None:
    values = {"a": np.array([1.0, 2.0, 6.0]), "b": np.array([5.0, 1.0, 0.0]), "c": np.array([1.0, 1.0, 4.0])}
    scores = Scores({name: {"g": vector} for name, vector in values.items()})
    nested = Product(RankSum("a", "b"), "c")
    found = with_combinations(scores, [nested])["(a+b)*c"]["g"]
    inner = RankSum("a", "b").combine([values["a"], values["b"]])
    np.testing.assert_array_equal(found, Product("x", "y").combine([inner, values["c"]]))


def test_scored_with_their_parts_which_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("residual"), labelled("residual")
    graph = trace(model, data[0][0])
    started: list[str] = []
    start: Callable = Wasserstein.start
    monkeypatch.setattr(Wasserstein, "start", lambda self, c: started.append(self.name) or start(self, c))
    asked = (name for name in ("l1*wasserstein", "wasserstein+taylor", "wasserstein"))
    scores = score(graph, data, asked)
    assert started == ["wasserstein"]
    assert scores.signals == ("l1", "wasserstein", "taylor", "l1*wasserstein", "wasserstein+taylor")
    for group in graph.groups:
        parts = [scores[name][group.name] for name in ("l1", "wasserstein")]
        expected = parts[0] / parts[0].mean() * parts[1] / parts[1].mean()
        np.testing.assert_allclose(scores["l1*wasserstein"][group.name], expected, rtol=1e-12)


def test_instances_bring_their_settings() -> None:
    model, data = build("mlp"), labelled("mlp")
    graph = trace(model, data[0][0])
    scores = score(graph, data, Product(Magnitude(p=1), "taylor"))
    one = score(graph, signals=Magnitude(p=1))["magnitude"]
    for group, vector in one.items():
        np.testing.assert_array_equal(scores["magnitude"][group], vector)
    assert "magnitude*taylor" in scores


def test_prune_by_a_combination() -> None:
    model, data = build("residual", torch.float32), labelled("residual", (16, 16, 16), torch.float32)
    result = sc.prune(
        model, data, sc.Budget(macs=0.6), sc.ToD(removal="l1*wasserstein", protection="fisher+taylor"),
        repair=None, measure_latency=False, progress=False,
    )  # fmt: skip
    assert result.plan.settings["removal"] == "l1*wasserstein"
    scores = score(result.graph, sc.Calibration.of(data).split()[0], ("l1*wasserstein", "fisher+taylor"))
    again = sc.ToD(removal="l1*wasserstein", protection="fisher+taylor").allocate(
        result.graph, scores, sc.Budget(macs=0.6)
    )
    assert again.groups == result.plan.groups
    assert result.plan.predicted.macs <= 0.6 * result.plan.dense.macs


def test_negative_scores_are_not_multiplied_but_may_be_ranked() -> None:
    scores = Scores({"a": {"g": np.array([1.0, -2.0])}, "b": {"g": np.array([1.0, 2.0])}})
    with pytest.raises(ScoreError, match=r"signal b\*a: expected scores of 0 or more .* got -2.0 from a"):
        with_combinations(scores, [Product("b", "a")])
    np.testing.assert_array_equal(with_combinations(scores, ["a+b"])["a+b"]["g"], [0.5, 0.5])


def test_what_cannot_be_combined() -> None:
    with pytest.raises(SettingError, match="Product: expected at least two signals, got 1"):
        Product("a")
    with pytest.raises(SettingError, match="RankSum: expected names and instances of signals, got 3"):
        RankSum("a", 3)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="Pass an instance, not a class"):
        Product("a", Magnitude)  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="expected one of a, got 'b'"):
        with_combinations(Scores({"a": {"g": np.ones(2)}}), ["a*b"])
