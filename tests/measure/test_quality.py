"""How much worse a model is, sample by sample: accuracy, losses, and metrics of the user's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.calibration import Calibration
from secateur.errors import CalibrationError, SettingError
from secateur.measure.quality import Gauge, sample_losses


class Scaled(nn.Module):
    """Logits: the inputs, with noise of its own."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(noise))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.noise * torch.sin(50 * x.roll(1, 0))


def batches(labels: bool = True) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 3, generator=generator)
    y = (x + torch.randn(90, 3, generator=generator)).argmax(1)
    raw = [(a, b) if labels else (a,) for a, b in zip(x.split(20), y.split(20), strict=True)]
    return Calibration.of(raw)


DENSE, OTHER = Scaled(0.0).eval(), Scaled(0.7).eval()


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    data = list(batches())
    with torch.no_grad():
        return torch.cat([model(*b.args) for b in data]), torch.cat([b.labels for b in data])  # type: ignore[misc]


def test_accuracy_is_that_of_evaluate_and_differences_are_paired() -> None:
    found = Gauge(DENSE, batches())(OTHER, "accuracy_drop")
    (before, labels), (after, _) = outputs(DENSE), outputs(OTHER)
    right, still = before.argmax(1) == labels, after.argmax(1) == labels
    assert found.dense == pytest.approx(float(right.double().mean()))
    assert found.model == pytest.approx(float(still.double().mean()))
    assert found.differences.tolist() == (right.double() - still.double()).tolist()
    assert found.value == pytest.approx(found.dense - found.model)
    low, high = found.interval(0.95)
    assert low < found.value < found.bound(0.95) < high


def test_without_labels_the_dense_model_is_right() -> None:
    gauge = Gauge(DENSE, batches(labels=False))
    assert gauge.name("accuracy_drop") == "agreement with the dense model"
    found = gauge(OTHER, "accuracy_drop")
    (before, _), (after, _) = outputs(DENSE), outputs(OTHER)
    assert found.dense == 1
    assert found.value == pytest.approx(float((before.argmax(1) != after.argmax(1)).double().mean()))


def test_losses() -> None:
    gauge = Gauge(DENSE, batches())
    (before, labels), (after, _) = outputs(DENSE), outputs(OTHER)
    a, b = float(F.cross_entropy(before, labels)), float(F.cross_entropy(after, labels))
    rise = gauge(OTHER, "loss_rise")
    assert (rise.dense, rise.model) == (pytest.approx(a), pytest.approx(b))
    assert rise.value == pytest.approx(b / a - 1)
    perplexity = gauge(OTHER, "perplexity_rise")
    assert (perplexity.dense, perplexity.model) == (pytest.approx(math.exp(a)), pytest.approx(math.exp(b)))
    assert perplexity.value == pytest.approx(math.exp(b) / math.exp(a) - 1)
    assert perplexity.bound(0.95) > perplexity.value


def own(model: Any, raw: Any) -> Tensor:
    """A loss of the user's own."""
    return (model(raw[0]) - raw[1][:, None]).square().mean()


@torch.no_grad()
def test_sample_losses_average_to_the_loss_of_the_batch() -> None:
    batch = batches().first()
    found = sample_losses(DENSE, batch)
    assert len(found) == 20
    assert batch.labels is not None
    assert np.mean(found) == pytest.approx(float(F.cross_entropy(DENSE(*batch.args), batch.labels)))
    assert np.mean(sample_losses(DENSE, batch, own)) == pytest.approx(float(own(DENSE, batch.raw)))


def test_a_metric_of_the_users_own() -> None:
    def margin(model: Any, raw: Any) -> Tensor:
        return model(raw[0]).softmax(1).max(1).values

    gauge = Gauge(DENSE, batches(), margin)
    assert gauge.name("accuracy_drop") == "margin"
    found = gauge(OTHER, "accuracy_drop")
    means = [float(outputs(m)[0].softmax(1).max(1).values.double().mean()) for m in (DENSE, OTHER)]
    assert found.value == pytest.approx(means[0] - means[1])


def test_numerators_and_counts_are_summed_before_they_are_divided() -> None:
    """The F1 of class 0: twice the hits, over the predictions and the labels of it."""

    def counts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        said, true = logits.argmax(1) == 0, labels == 0
        return 2.0 * (said & true), said.double() + true

    found = Gauge(DENSE, batches(), lambda model, raw: counts(model(raw[0]), raw[1]))(OTHER, "accuracy_drop")
    sums = [[float(part.sum()) for part in counts(*outputs(m))] for m in (DENSE, OTHER)]
    scores = [above / below for above, below in sums]
    assert (found.dense, found.model) == (pytest.approx(scores[0]), pytest.approx(scores[1]))
    assert found.value == pytest.approx(scores[0] - scores[1])
    assert found.bound(0.95) > found.value


@pytest.mark.parametrize(
    "metric",
    [
        lambda model, raw: 0.5,
        lambda model, raw: torch.zeros(3),
        lambda model, raw: torch.full((len(raw[0]),), math.nan),
        lambda model, raw: "good",
        lambda model, raw: None,
        lambda model, raw: (None, None),
        lambda model, raw: (torch.zeros(len(raw[0])), torch.zeros(2)),
    ],
)
def test_what_is_no_number_a_sample_is_refused(metric: Any) -> None:
    with pytest.raises(SettingError, match=r"metric: expected one finite number for each of 20 samples"):
        Gauge(DENSE, batches(), metric)(OTHER, "accuracy_drop")


def test_where_no_sample_counts_it_is_said() -> None:
    nothing = Gauge(DENSE, batches(), lambda model, raw: (torch.zeros(len(raw[0])), torch.zeros(len(raw[0]))))
    with pytest.raises(CalibrationError, match="expected held-out samples with a label or count, got none"):
        nothing(OTHER, "accuracy_drop")


def test_a_metric_that_fails_is_named_on_the_first_batch() -> None:
    def failing(model: nn.Module, batch: Any) -> Any:
        return len(batch) / 0

    with pytest.raises(CalibrationError, match=r"held-out data, batch 0: .*ZeroDivisionError"):
        Gauge(DENSE, batches(), failing).check("accuracy_drop")


def test_counts_below_zero_are_refused() -> None:
    def wrong(model: nn.Module, batch: Any) -> Any:
        return torch.ones(len(batch[1])), -torch.ones(len(batch[1]))

    with pytest.raises(SettingError, match=r"metric: expected counts of at least 0, got -1"):
        Gauge(DENSE, batches(), wrong)(OTHER, "accuracy_drop")


def test_without_classes_accuracy_is_refused() -> None:
    data = Calibration.of([(torch.randn(6, 3), torch.randn(6, 3))])
    gauge = Gauge(DENSE, data)
    with pytest.raises(CalibrationError, match=r"accuracy_drop: expected logits .* Pass metric="):
        gauge(OTHER, "accuracy_drop")
    assert gauge.bound() == "loss_rise"
    assert Gauge(DENSE, batches()).bound() == "accuracy_drop"
