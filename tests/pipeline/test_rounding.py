"""`Limits(round_to="measured")` takes the fastest multiple that is as good; clocks are replaced here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.pipeline import rounding
from secateur.pipeline.bounds.measured_bounds import Latency

LIMITS = sc.Limits(round_to="measured")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    ).eval()  # fmt: skip


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, 12, generator=generator) for _ in range(10)]


def faster_in(multiple: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Make models fast whose widths are all multiples of a number; return the widths that were timed."""
    seen: list[list[int]] = []

    def times(self: Latency, *models: nn.Module) -> list[tuple[float, ...]]:
        layers = [[m for m in model.modules() if isinstance(m, nn.Linear)] for model in models]
        widths = [[layer.out_features for layer in each[:-1]] for each in layers]
        seen.extend(widths)
        rng = np.random.default_rng(0)
        bases = [1.0 if all(w % multiple == 0 for w in each) else 2.0 for each in widths]
        return [tuple(base * (1 + 0.01 * rng.random(30))) for base in bases]

    monkeypatch.setattr(Latency, "times", times)
    return seen


def pruned(limits: sc.Limits = LIMITS, **settings: object) -> sc.Result:
    return sc.prune(
        network(), data(), sc.Budget(macs=0.55), "repair_aware", limits=limits, repair="reconstruct",
        measure_latency=False, progress=False, **settings,
    )  # type: ignore[arg-type]  # fmt: skip


def kept(result: sc.Result) -> list[int]:
    return [group.kept for group in result.plan.groups]


def test_the_fastest_multiple_that_is_as_good_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "WORSE", np.inf)
    seen = faster_in(8, monkeypatch)
    found = pruned()
    assert all(n % 8 == 0 for n in kept(found))
    limits = found.plan.settings["limits"]
    assert isinstance(limits, dict)
    assert limits["round_to"] == 8
    assert kept(found) == kept(pruned(sc.Limits(round_to=8)))
    assert found.report.rounding.startswith("Kept numbers are multiples of 8.")
    assert found.report.rounding in found.report.to_markdown()
    assert len(seen) == len({tuple(widths) for widths in seen}), "no plan is timed twice"


def test_what_is_no_faster_stays_as_fine_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "WORSE", np.inf)
    faster_in(1, monkeypatch)
    found = pruned()
    assert kept(found) == kept(pruned(sc.Limits()))


def test_a_multiple_that_is_clearly_worse_is_not_even_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = faster_in(32, monkeypatch)
    found = pruned()
    assert [32, 32] not in seen
    assert "Worse on held-out data" in found.report.rounding
    assert "32" in found.report.rounding.partition("Worse")[2]


def test_what_rounding_cannot_serve_is_refused() -> None:
    for granularity in ("weight", "block"):
        with pytest.raises(sc.SettingError, match="no kernel is faster"):
            sc.prune(network(), data(), sc.Budget(params=0.5), limits=LIMITS, granularity=granularity)
    with pytest.raises(sc.SettingError, match=r"which sc\.prune alone measures"):
        LIMITS.feasible(64)
    with pytest.raises(sc.SettingError, match="expected round_to to be an integer"):
        sc.Limits(round_to="fast")  # type: ignore[arg-type]
