"""Distances to the dense model against literal sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.calibration import Calibration
from secateur.measure.evaluate import evaluate
from secateur.measure.measures import DISTANCE, DIVERGENCE
from secateur.repairs import judging
from secateur.repairs.judging import Judge

DATA = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (6, 5)]


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3).double()


def test_errors_are_squared_distances_of_each_sample_over_the_mean_square() -> None:
    dense, other = linear(0), linear(1)
    judge = Judge(dense, Calibration.of(DATA))
    x = torch.cat(DATA)
    with torch.no_grad():
        wanted = dense(x)
        expected = (other(x) - wanted).square().sum(1) / wanted.square().sum(1).mean()
    for _ in range(2):  # the second time from what was kept
        np.testing.assert_allclose(judge(other), expected.numpy(), rtol=1e-12)
    np.testing.assert_array_equal(judge(dense), 0)
    assert other.training


def test_nothing_is_kept_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    every = Judge(linear(0), Calibration.of(DATA))(linear(1))
    monkeypatch.setattr(judging, "HELD_BYTES", 150)  # the first batch only
    judge = Judge(linear(0), Calibration.of(DATA))
    np.testing.assert_array_equal(judge(linear(1)), every)
    assert list(judge._kept) == [0]
    np.testing.assert_array_equal(judge(linear(1)), every)


def test_a_loss_judges_if_there_is_one() -> None:
    data = [(x, torch.arange(len(x)) % 3) for x in DATA]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    found = Judge(linear(0), Calibration.of(data), loss)(linear(1))
    assert len(found) == 6 + 5  # eight pieces at most, of six and of five samples
    with torch.no_grad():
        assert found[0] == pytest.approx(float(loss(linear(1), (DATA[0][:1], torch.tensor([0])))))


class Odd(nn.Module):
    """A mapping with a mask of minus infinity, rows, and a number for the whole batch."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        masked = torch.where(x > 0, x * self.by, -torch.inf)
        return {"rows": masked, "whole": x.sum() * self.by, "index": x.argmax(1)}


def test_what_is_infinite_in_both_does_not_count_and_in_one_it_is_infinitely_bad() -> None:
    judge = Judge(Odd(1.0), Calibration.of(DATA))
    x = torch.cat(DATA)
    inside = torch.where(x > 0, x, 0.0).square().sum(1)
    np.testing.assert_allclose(judge(Odd(2.0)), (inside / inside.mean()).numpy())
    assert np.isinf(judge(Odd(-torch.inf))).any()
    assert np.isinf(judge(Odd(torch.nan))).any()


class Words(nn.Module):
    """A language model of 7 words: shifting all scores of a position, or scaling them."""

    def __init__(self, shift: float = 0.0, scale: float = 1.0, *, hidden: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7, dtype=torch.float64)
        self.shift, self.scale, self.hidden = shift, scale, hidden

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.table(ids)
        scores = scores * self.scale + self.shift * scores.mean(-1, keepdim=True)
        return {"logits": scores[:, :-1] if self.hidden else scores}


def test_language_models_are_measured_by_the_divergence_of_their_words() -> None:
    """Also where nobody asked for it: a shift of all scores changes no word, so it is no error."""
    ids = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, 4:] = 0
    data: list[Any] = [{"ids": ids, "attention_mask": mask}]
    dense, other = Words(), Words(shift=3.0, scale=0.7)
    judge = Judge(dense, Calibration.of(data))
    assert judge.measure == DIVERGENCE
    np.testing.assert_allclose(judge(Words(shift=3.0)), 0, atol=1e-12)
    wanted = []
    with torch.no_grad():
        for text, real in zip(ids, mask, strict=True):
            row = text[real.bool()][None]
            p, q = (m(row)["logits"][0].log_softmax(-1) for m in (dense, other))
            wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
    np.testing.assert_allclose(judge(other), wanted, rtol=1e-9)
    found = evaluate(other, data, dense=dense)
    assert (found.measure, found.samples) == (DIVERGENCE, 5)
    assert found.loss == pytest.approx(float(np.mean(wanted)))
    # Scores of other things than the tokens that were read, as of a detector's boxes: more outputs count.
    assert Judge(Words(hidden=True), Calibration.of(data)).measure == DISTANCE
    assert Judge(dense, Calibration.of(data), by_scores=False).measure == DISTANCE


def test_a_text_of_padding_alone_is_no_error() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    judge = Judge(Words(), Calibration.of([{"ids": ids, "attention_mask": mask}]))
    found = judge(Words(scale=0.5))
    assert found[0] > 0
    assert found[1] == 0
