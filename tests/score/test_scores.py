from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.errors import ScoreError
from secateur.graph.trace import trace
from secateur.score import Scores
from tests.models import build


def test_scores_are_read_only_copies() -> None:
    given = np.array([1, 2])
    scores = Scores({"a": {"g": given}})
    given[0] = 9
    assert scores["a"]["g"].tolist() == [1.0, 2.0]
    assert scores["a"]["g"].dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        scores["a"]["g"][0] = 1.0
    with pytest.raises(TypeError):
        scores["a"]["g"] = given  # type: ignore[index]


def test_what_is_in_them() -> None:
    scores = Scores({"a": {"g": np.zeros(2)}, "b": {"g": np.ones(2)}}, samples=7, classes=2, seed=1)
    assert scores.signals == ("a", "b")
    assert "a" in scores
    assert "c" not in scores
    assert repr(scores) == "Scores(a, b: 1 groups, 7 samples, seed 1)"
    with pytest.raises(ScoreError, match="expected one of a, b, got 'c'"):
        scores["c"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"a": {"g": np.array([0.0, np.nan])}},
            "signal a, group g: expected finite scores, got nan for unit 1",
        ),
        ({"a": {"g": np.array([np.inf])}}, "got inf for unit 0"),
        ({"a": {"g": np.zeros((2, 2))}}, r"expected one score per unit, got shape \[2, 2\]"),
        ({"a": {"g": np.zeros(2)}, "b": {"h": np.zeros(2)}}, r"signal b: .* difference in \['g', 'h'\]"),
    ],
)
def test_malformed_scores(values: dict[str, dict[str, np.ndarray]], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        Scores(values)


def test_scores_belong_to_a_graph() -> None:
    graph = trace(build("mlp"), torch.zeros(2, 6, dtype=torch.float64))
    values = {group.name: np.zeros(group.size) for group in graph.groups}
    Scores({"a": values}, fingerprint=graph.fingerprint).check(graph)
    with pytest.raises(ScoreError, match="signal a, group 0: expected 12 scores, got 3"):
        Scores({"a": values | {"0": np.zeros(3)}}).check(graph)
    with pytest.raises(ScoreError, match="group other: expected no scores, got 3"):
        Scores({"a": values | {"other": np.zeros(3)}}).check(graph)
    with pytest.raises(ScoreError, match=r"expected scores of model .*, got 0000"):
        Scores({"a": values}, fingerprint="0" * 64).check(graph)
