"""Loss and accuracy against what a person would write; distance to a dense model without labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.measure.evaluate import squared_distance
from tests.graph.test_trace import assert_same, state_of
from tests.graph.tiny import Calls


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 5))


def batches(sizes: tuple[int, ...] = (6, 2, 4)) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3), torch.randint(5, (n,))) for n in sizes]


def test_means_over_samples_of_batches_of_any_size() -> None:
    model, data = net(), batches()
    inputs, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    model.eval()
    with torch.no_grad():
        logits = model(inputs)
    model.train()
    found = sc.evaluate(model, data)
    assert found.samples == 12
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found.measure == "loss"


def test_the_model_is_left_as_it_was() -> None:
    model, data = net(), batches()
    before = state_of(model)
    sc.evaluate(model, data)
    assert_same(before, state_of(model))
    with pytest.raises(sc.CalibrationError):
        sc.evaluate(model, [(torch.randn(2, 3), torch.tensor([0, 9]))])
    assert [m.training for m in model.modules()] == before["modes"]


def test_a_loss_of_ones_own_replaces_it() -> None:
    model, data = net().eval(), batches()
    found = sc.evaluate(model, data, loss_fn=lambda m, batch: m(batch[0]).mean() * 0 + len(batch[1]))
    assert found.loss == pytest.approx((6 * 6 + 2 * 2 + 4 * 4) / 12)
    assert found.accuracy is None


def test_without_labels_the_distance_to_the_dense_model() -> None:
    dense = nn.Linear(3, 2)
    small = nn.Linear(3, 2)
    data = [(torch.randn(4, 3),), (torch.randn(2, 3),)]
    found = sc.evaluate(small, data, dense=dense)
    x = torch.cat([b[0] for b in data])
    with torch.no_grad():
        wanted = (small(x) - dense(x)).square().sum() / dense(x).square().sum()
    assert found.measure == "distance to dense"
    assert found.loss == pytest.approx(float(wanted), rel=1e-5)
    assert found.accuracy is None
    assert sc.evaluate(dense, data, dense=dense).loss == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_the_farthest(value: float) -> None:
    """To leave them out would make a broken model the best of all."""
    dense = nn.Linear(3, 2)
    broken = Calls(lambda m, x: m.dense(x) * value, dense=dense)
    assert sc.evaluate(broken, [(torch.randn(4, 3),)], dense=dense).loss == math.inf
    masked = Calls(lambda m, x: torch.cat([m.dense(x), torch.full((len(x), 1), -math.inf)], 1), dense=dense)
    assert sc.evaluate(masked, [(torch.randn(4, 3),)], dense=masked).loss == 0.0


def test_mappings_with_a_loss_of_their_own() -> None:
    class Output(dict):
        __getattr__ = dict.get

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 5)

        def forward(self, x: Tensor, labels: Tensor) -> Output:
            logits = self.net(x)
            return Output(loss=F.cross_entropy(logits, labels) + 1, logits=logits)

    model = Model()
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    found = sc.evaluate(model, [{"x": x, "labels": labels}])
    with torch.no_grad():
        assert found.loss == pytest.approx(float(F.cross_entropy(model.net(x), labels)) + 1)
        assert found.accuracy == pytest.approx(float((model.net(x).argmax(1) == labels).float().mean()))


def test_dense_labels_have_no_top_1() -> None:
    model = nn.Conv2d(3, 5, 1)
    found = sc.evaluate(model, [(torch.randn(2, 3, 4, 4), torch.randint(5, (2, 4, 4)))])
    assert found.accuracy is None
    assert math.isfinite(found.loss)


def test_no_labels_and_nothing_to_compare_with() -> None:
    with pytest.raises(sc.CalibrationError, match="expected labels, got none"):
        sc.evaluate(net(), [(torch.randn(2, 3),)])
    with pytest.raises(sc.CalibrationError, match="got an empty loader"):
        sc.evaluate(net(), [])


def test_samples_without_a_class_do_not_count() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    found = sc.evaluate(nn.Identity(), [(logits, torch.tensor([0, -100, 1]))])
    assert found.accuracy == 0.5


def test_distances_are_infinite_where_only_one_model_gives_a_number() -> None:
    theirs = [torch.tensor([[1.0, -torch.inf], [torch.nan, 2.0], [3.0, 4.0]])]
    mine = [torch.tensor([[3.0, -torch.inf], [torch.nan, 2.0], [3.0, torch.inf]])]
    error, norm = squared_distance(mine, theirs, 3)
    assert error.tolist() == [4.0, 0.0, math.inf]
    assert norm.tolist() == [1.0, 4.0, 25.0]
    error, norm = squared_distance(mine, theirs)
    assert (error.tolist(), norm.tolist()) == ([math.inf], [30.0])
    assert squared_distance(theirs, mine, 3)[0].tolist() == [4.0, 0.0, math.inf]
