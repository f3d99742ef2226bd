"""The measurement on a clock of its own: exact figures, verdicts, and the sentence where there is no gain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measure.latency.timing import flushed_subnormals
from tests.measure.latency.clock import Clock, Timed


def test_figures_and_verdicts(clock: Clock) -> None:
    dense, small = Timed(clock, 0.004, 0.002), Timed(clock, 0.004, 0.001)
    found = sc.bench(dense, small, torch.zeros(2, 4), batches=(1, 32), rounds=7, warmup=2)
    assert [(r.batch, r.dense.median, r.pruned.median) for r in found.rows] == [
        (1, pytest.approx(0.006), pytest.approx(0.005)),
        (32, pytest.approx(0.068), pytest.approx(0.036)),
    ]
    assert [r.speedup.value for r in found.rows] == [pytest.approx(1.2), pytest.approx(68 / 36)]
    assert [len(r.dense.seconds) for r in found.rows] == [7, 7]
    assert [r.verdict for r in found.rows] == ["faster", "faster"]
    assert found.reasons == ()
    assert "1.89 times as fast in eager with a batch of 32, and faster in every row" in str(found)
    assert "why is there no speed-up" not in str(found)
    assert found.to_dict()["rows"][1]["verdict"] == "faster"


def test_no_gain_is_said_plainly_and_explained(clock: Clock) -> None:
    slow = Timed(clock, 0.1, 0.001)
    found = sc.bench(slow, slow, torch.zeros(1, 4), batches=(1, 100), rounds=5)
    assert [r.verdict for r in found.rows] == ["no gain", "no gain"]
    text = " ".join(str(found).split())
    assert "The pruned model is not measurably faster" in text
    assert "why is there no speed-up?" in text
    # 101 ms for one sample, 2 ms for each of a hundred.
    assert "takes 50.5 times as long in a batch of 1 as in one of 100" in text


def test_a_slower_model_is_called_slower(clock: Clock) -> None:
    found = sc.bench(Timed(clock, 0.01, 0), Timed(clock, 0.02, 0), torch.zeros(1, 4), rounds=5)
    assert found.rows[0].verdict == "slower"
    assert found.rows[0].speedup.high == pytest.approx(0.5)


def pruned(form: Any, share: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    x = torch.randn(2, 4)
    graph = sc.trace(net, x)
    plan = sc.Uniform(removal="magnitude", ratio=share).allocate(graph, sc.score(graph, None, ("magnitude",)))
    return net, sc.apply(net, plan, form, graph=graph, example_inputs=x)


@pytest.mark.parametrize(
    ("form", "share", "words"),
    [
        ("masked", 0.5, "form masked: what was removed is zero, not gone"),
        ("auto", 0.07, "Only 6.2% of the MACs were removed"),
        ("auto", 0.6, "is no multiple of 8 (0: 13 of 32)"),
    ],
)
def test_reasons_from_the_record(clock: Clock, form: Any, share: float, words: str) -> None:
    net, small = pruned(form, share)
    for model in (net, small):  # both take the same
        model.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 0.01))
    found = sc.bench(net, small, rounds=5)
    assert found.rows[0].verdict == "no gain"
    assert words in " ".join(found.reasons)
    for sign, here in (("form masked", form == "masked"), ("Only", share < 0.1)):
        assert (sign in " ".join(found.reasons)) == here


def test_a_busy_machine_is_named(clock: Clock) -> None:
    class Busy(Timed):
        def forward(self, x: torch.Tensor) -> Any:
            self.clock.now += float(torch.rand(()) ** 4)
            return self.layer(x)

    found = sc.bench(Busy(clock, 0, 0), Busy(clock, 0, 0), torch.zeros(1, 4), rounds=10)
    assert found.rows[0].verdict == "no gain"
    assert "Something else kept the machine busy" in found.reasons[0]


def test_a_back_end_that_cannot_run_is_named_and_the_rest_measured(clock: Clock) -> None:
    class Odd(Timed):
        def forward(self, x: torch.Tensor) -> Any:
            if type(x) is not torch.Tensor:  # as in an export
                raise RuntimeError("not for export")
            return super().forward(x)

    model = Odd(clock, 0.01, 0)
    found = sc.bench(model, model, torch.zeros(2, 4), backends=("onnxruntime", "eager"), rounds=5)
    assert [r.backend for r in found.rows] == ["eager"]
    assert "not for export" in found.failed["onnxruntime"]
    assert "onnxruntime could not run both models" in str(found)
    with pytest.raises(sc.SettingError, match="a back end that runs both models"):
        sc.bench(model, model, torch.zeros(2, 4), backends=("onnxruntime",), rounds=5)


def test_refusals() -> None:
    net = nn.Linear(4, 2)
    for settings, words in (
        ({"backends": ("tensorrt",)}, "eager, compile, onnxruntime, got tensorrt"),
        ({"backends": ()}, "got none"),
        ({"rounds": 4}, "at least 5"),
        ({"warmup": -1}, "at least 0"),
        ({"batches": (0,)}, "at least 1"),
        ({"confidence": 1.0}, r"in \(0, 1\)"),
    ):
        with pytest.raises(sc.SettingError, match=words):
            sc.bench(net, net, torch.zeros(1, 4), **settings)  # type: ignore[arg-type]
    with pytest.raises(sc.SettingError, match="expected example_inputs"):
        sc.bench(net, net)


def test_subnormals_are_flushed_inside_only() -> None:
    tiny = torch.tensor(torch.finfo(torch.float32).tiny)
    was = float(tiny * 0.5)
    with flushed_subnormals():
        assert float(tiny * 0.5) == 0
    assert float(tiny * 0.5) == was
    torch.set_flush_denormal(True)
    try:
        with flushed_subnormals():
            pass
        assert float(tiny * 0.5) == 0
    finally:
        torch.set_flush_denormal(False)


def test_a_latency_budget_is_met_by_measurement(clock: Clock) -> None:
    """A clock by which a fifth of the dense time is fixed and the rest goes with the weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    whole = sum(p.numel() for p in net.parameters())

    def takes(model: nn.Module, *_: Any) -> None:
        clock.now += 0.2 + 0.8 * sum(p.numel() for p in model.parameters()) / whole

    net.register_forward_hook(takes)
    data = [(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(5)]
    rule = sc.Uniform(removal="magnitude")
    found = sc.prune(net, data, sc.Budget(latency=0.6), rule, repair=None, form="module", progress=False)
    measured: Any = found.plan.settings["met"]
    assert measured["latency"]["high"] <= 0.6
    # 0.2 + 0.8·weights ≤ 0.6: half of the weights, of which each of 64 units is one.
    kept = found.plan.predicted.params / found.plan.dense.params
    assert 0.46 <= kept <= 0.5
    assert found.plan.budget == {"latency": 0.6}
    dense, small = found.report.figures[:2]
    assert small.latency / dense.latency == pytest.approx(0.2 + 0.8 * kept)
    both = sc.prune(
        net, data, sc.Budget(latency=0.6, macs=0.25), rule, repair=None, form="module", progress=False
    )
    assert both.plan.predicted.macs / both.plan.dense.macs <= 0.25
    with pytest.raises(sc.UnreachableBudgetError, match="of the dense latency") as caught:
        sc.prune(net, data, sc.Budget(latency=0.1), rule, repair=None, form="module", progress=False)
    assert caught.value.smallest >= 0.2


def test_a_latency_budget_needs_prune_and_a_fraction() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.zeros(2, 4)
    graph = sc.trace(net, x)
    with pytest.raises(sc.BudgetError, match=r"got latency\. Use secateur\.prune"):
        sc.Uniform(removal="magnitude").allocate(
            graph, sc.score(graph, None, ("magnitude",)), sc.Budget(latency=0.5)
        )
    with pytest.raises(sc.BudgetError, match=r"latency to be a share .* got 2\. Write latency=0\.6"):
        sc.Budget(latency=2)
