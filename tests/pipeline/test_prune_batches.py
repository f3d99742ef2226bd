"""`sc.prune` on batches as people have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from tests.helpers.lengths import SIZES, batches, network

QUICK: dict[str, Any] = {"measure_latency": False, "progress": False}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_differ_from_batch_to_batch(name: str) -> None:
    model, data = network(name, torch.float32), batches(name, dtype=torch.float32) * 2
    result = sc.prune(model, data, sc.Budget(params=0.75), "global", **QUICK)
    assert result.plan.predicted.params <= 0.75 * result.plan.dense.params
    assert all(figure.samples > 0 for figure in result.report.figures)
    fixed = [entry for entry in result.report.repairs if "expected" in entry.get("why", "")]
    assert not fixed


@pytest.mark.parametrize("name", ["padded", "steps"])
def test_auto_leaves_out_what_cannot_be_seen_at_every_size(name: str) -> None:
    model, data = network(name, torch.float32), batches(name, dtype=torch.float32) * 2
    auto = sc.Auto(candidates={"tod": "tod", "magnitude": sc.Global(), "fisher": sc.Global(removal="fisher")})
    result = sc.prune(model, data, sc.Budget(params=0.75), auto, **QUICK)
    assert result.report.selection is not None
    out = {c.name: c.verdict for c in result.report.selection.candidates if "did not run" in c.verdict}
    assert set(out) == (set() if name == "padded" else {"tod", "fisher"})
    assert all("as often as at the traced ones" in verdict for verdict in out.values())


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def labelled(kind: str) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(6):
        x, classes = torch.randn(9, 4, generator=generator), torch.arange(9) % 3
        labels: Any = {
            "classes": classes,
            "numbers": torch.randn(9, 3, generator=generator),
            "one-hot": F.one_hot(classes, 3).float(),
            "one-hot integers": F.one_hot(classes, 3),
            "soft": torch.full((9, 3), 1 / 3),
            "zeros and ones": torch.ones(9, 3),
            "boxes": [{"boxes": torch.rand(9, 4)}] * 9,
        }[kind]
        found.append((x, labels))
    return found


@pytest.mark.parametrize(
    ("kind", "loss", "out"),
    [
        ("numbers", "mean squared error, for floating labels", {"tod"}),
        ("one-hot", "cross-entropy of soft labels", set()),
        ("one-hot integers", "default", set()),
        ("soft", "cross-entropy of soft labels", {"tod"}),
        ("boxes", "default", {"tod", "fisher"}),
    ],
)
def test_auto_leaves_out_what_needs_other_labels(kind: str, loss: str, out: set[str]) -> None:
    auto = sc.Auto(candidates={"tod": "tod", "magnitude": sc.Global(), "fisher": sc.Global(removal="fisher")})
    result = sc.prune(plain(), labelled(kind), sc.Budget(params=0.75), auto, **QUICK)
    assert result.report.asked["loss"] == loss
    assert result.report.selection is not None
    verdicts = {c.name: c.verdict for c in result.report.selection.candidates}
    assert {name for name, verdict in verdicts.items() if "did not run" in verdict} == out
    first = result.report.figures[0]
    assert (first.accuracy is not None) == ("one-hot" in kind or kind == "soft")
    if kind == "numbers":
        model, data = plain(), labelled(kind)
        held = data[4]
        with torch.no_grad():
            wanted = float(F.mse_loss(model(held[0]), held[1]))
        assert first.loss == pytest.approx(wanted, rel=1e-5)


def test_one_hot_labels_are_their_classes() -> None:
    found = [
        sc.prune(plain(), labelled(kind), sc.Budget(params=0.75), "tod", **QUICK)
        for kind in ("classes", "one-hot", "one-hot integers")
    ]
    assert found[0].plan == found[1].plan == found[2].plan
    assert found[0].report.figures[1].accuracy == found[1].report.figures[1].accuracy


def test_zeros_and_ones_are_refused_before_anything_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    def trace(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(sys.modules["secateur.pipeline.targets.units"], "trace", trace)
    with pytest.raises(sc.CalibrationError, match=r"zeros and ones alone\. Pass loss_fn") as refused:
        sc.prune(plain(), labelled("zeros and ones"), sc.Budget(params=0.75), "uniform", **QUICK)
    assert len(str(refused.value)) <= 600


def test_a_number_a_sample() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 1)).eval()
    data = [(torch.randn(9, 4), torch.randn(9)) for _ in range(6)]
    expected = sum(float(F.mse_loss(net(x)[:, 0], y)) for x, y in data) / 6
    found = sc.evaluate(net, data)
    assert (found.loss, found.accuracy) == (pytest.approx(expected, rel=1e-5), None)
    assert sc.prune(net, data, sc.Budget(params=0.75), "uniform", **QUICK).report.figures[0].accuracy is None


class Detector(nn.Module):
    """Gives scores, or with targets a loss, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor, targets: Any = None) -> torch.Tensor:
        """Scores at each place, or the loss."""
        scores = self.c(self.b(self.a(x).relu()).relu())
        return scores if targets is None else (scores.mean((2, 3)) - targets).square().mean()


def test_rules_compete_under_a_loss_that_calls_the_model_in_another_way() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(4, 3, 8, 8), torch.randn(4, 3)) for _ in range(4)]
    options: dict[str, Any] = {"forward": lambda m, b: m(b[0]), "loss_fn": lambda m, b: m(b[0], b[1])}
    result = sc.prune(Detector(), data, sc.Budget(params=0.7), **options, **QUICK)
    assert result.report.selection is not None
    assert result.report.selection.measure == "loss"
    assert result.plan.predicted.params <= 0.7 * result.plan.dense.params


def test_labels_that_do_not_fit_are_shown_with_the_batch_that_the_user_made() -> None:
    data = [(torch.randn(9, 4), torch.rand(9, 1)) for _ in range(4)]
    with pytest.raises(sc.CalibrationError, match=r"labels \[9\], .* \[9, 3\], got torch\.float32 \[9, 1\]"):
        sc.prune(plain(), data, sc.Budget(params=0.7), **QUICK)


class _OfSize(nn.Module):
    """Takes 20 samples, and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x)).view(20, 12))
        return found


@pytest.mark.parametrize(("make", "traced"), [(plain, 4), (_OfSize, 20)])
def test_a_large_batch_is_traced_on_a_few_samples_where_the_model_takes_them(make: Any, traced: int) -> None:
    data = [(torch.randn(20, 4), torch.arange(20) % 3) for _ in range(6)]
    result = sc.prune(make().eval(), data, sc.Budget(macs=0.6), "global", repair="reconstruct", **QUICK)
    (leaf,) = result.plan.inputs.tensors().values()
    assert leaf.shape == (traced, 4)
    assert result.model(data[0][0]).shape == (20, 3)
    assert result.report.proof is not None
    assert result.report.proof["proven"]
