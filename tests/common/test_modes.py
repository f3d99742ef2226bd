"""Modes around a call: those in which nothing can be measured are refused, the others make no difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.targets.units.plans import random_plan

DATA = [
    (torch.randn(8, 6, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in range(5)
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


MODEL = net()
GRAPH = sc.trace(MODEL, DATA[0][0])
PLAN = random_plan(GRAPH)
SMALL = sc.apply(MODEL, PLAN, graph=GRAPH)

CALLS: dict[str, Callable[[], Any]] = {
    "trace": lambda: sc.trace(MODEL, DATA[0][0]),
    "score": lambda: sc.score(GRAPH, DATA, ("wasserstein", "taylor"), progress=False),
    "apply": lambda: sc.apply(MODEL, PLAN),
    "verify": lambda: sc.verify(MODEL, SMALL, PLAN),
    "repair": lambda: sc.repair(SMALL, MODEL, DATA),
    "prune": lambda: sc.prune(
        MODEL, DATA, sc.Budget(macs=0.7), "uniform", measure_latency=False, progress=False
    ),
    "recover": lambda: sc.recover(SMALL, MODEL, DATA, epochs=1, progress=False),
    "evaluate": lambda: sc.evaluate(MODEL, DATA),
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "autocast": (
        lambda: torch.autocast("cpu", torch.bfloat16),
        r"torch\.autocast\('cpu'\).*enabled=False",
    ),
    "meta": (lambda: torch.device("meta"), r"torch\.device\('meta'\).*torch\.device\('cpu'\)"),
}


@pytest.mark.parametrize("mode", REFUSED)
@pytest.mark.parametrize("name", CALLS)
def test_what_computes_otherwise_is_refused_at_once(name: str, mode: str) -> None:
    context, message = REFUSED[mode]
    with context(), pytest.raises(sc.SettingError, match=f"^{name}: .*{message}"):
        CALLS[name]()


def test_files_are_neither_read_nor_exported_where_tensors_hold_no_numbers(tmp_path: Path) -> None:
    sc.save(SMALL, tmp_path / "saved")
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: sc.load(tmp_path / "saved", lambda: MODEL),
        "export": lambda: sc.export(SMALL, tmp_path / "net.pt2", DATA[0][0]),
    }
    for name, call in calls.items():
        with (
            torch.device("meta"),
            pytest.raises(sc.SettingError, match=rf"^{name}: .*torch\.device\('cpu'\)"),
        ):
            call()


@pytest.mark.parametrize("mode", REFUSED)
def test_the_cure_in_the_message_works(mode: str) -> None:
    cure = {"autocast": torch.autocast("cpu", enabled=False), "meta": torch.device("cpu")}[mode]
    with REFUSED[mode][0](), cure:
        assert sc.verify(MODEL, sc.apply(MODEL, PLAN), PLAN).proven


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_modes_without_gradients_make_no_difference(name: str, context: Callable[[], Any]) -> None:
    expected = CALLS[name]()
    with context():
        found = CALLS[name]()
    if isinstance(found, sc.Result):
        assert found.plan == expected.plan
        found, expected = found.model, expected.model
    assert str(found) == str(expected)
    if isinstance(found, nn.Module):
        pairs = zip(found.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(a, b) and not a.is_inference() for a, b in pairs)


@pytest.mark.parametrize("name", ["trace", "prune"])
def test_a_model_made_in_inference_mode_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        monkeypatch.setattr("tests.common.test_modes.MODEL", net())
    with pytest.raises(sc.SettingError, match=rf"^{name}: .*0\.weight, which was made in .*outside of it"):
        CALLS[name]()


def test_data_made_in_inference_mode_serve() -> None:
    with torch.inference_mode():
        data: list[tuple[Tensor, Tensor]] = [(x.clone(), y.clone()) for x, y in DATA]
    result = sc.prune(net(), data, sc.Budget(macs=0.7), measure_latency=False, progress=False)
    assert result.report.proof["proven"]
