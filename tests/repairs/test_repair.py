"""`sc.repair`: keeps what measurably helps, and nothing else."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.repairs import trials
from secateur.repairs.judging import Judge
from secateur.repairs.methods import AUTO, REPAIRS, Repair, Work
from secateur.repairs.repair import flush_subnormals
from secateur.repairs.trials import NOTHING
from secateur.targets.units.copying import duplicate
from tests.graph.test_trace import assert_same, state_of
from tests.helpers.models import TOPOLOGIES, build
from tests.targets.units.plans import plan_of, random_plan


def samples(batches: int = 5, *, labels: bool = True, shift: float = 0.0) -> list[tuple[Tensor, ...]]:
    """Inputs of `residual`, with the dense model's own answers as labels."""
    generator = torch.Generator().manual_seed(1)
    dense = build("residual")
    found: list[tuple[Tensor, ...]] = []
    for _batch in range(batches):
        x = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64) + shift
        with torch.no_grad():
            found.append((x, dense(x).argmax(1)) if labels else (x,))
    return found


@functools.cache
def pruned(form: str = "module") -> tuple[nn.Module, nn.Module]:
    dense = build("residual")
    graph = sc.trace(dense, TOPOLOGIES["residual"].inputs(2, torch.float64))
    return dense, sc.apply(dense, random_plan(graph, 0.25), form, graph=graph)


def held(data: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return data[4::5]


def by_method(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {tried["method"]: tried for tried in sc.record_of(model).repairs}


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("form", ["module", "graph", "masked"])
def test_the_best_on_held_out_data_is_kept_and_never_measures_worse(form: str, labels: bool) -> None:
    dense, small = pruned(form)
    data = samples(labels=labels)
    before = state_of(small)
    repaired = sc.repair(small, dense, data)
    assert_same(before, state_of(small))
    judge = Judge(dense, sc.Calibration.of(held(data)))
    ours, theirs = (float(judge(m).mean()) for m in (repaired, small))
    assert ours <= theirs
    tried = by_method(repaired)
    assert [*tried] == [" + ".join(names) for names in AUTO]
    best = min(tried.values(), key=lambda entry: entry["after"])
    assert [entry for entry in tried.values() if entry["kept"]] == [best]
    assert best["after"] == pytest.approx(ours)
    for entry in tried.values():
        assert entry["measure"] == "distance to dense"
        assert entry["before"] == pytest.approx(theirs)
        assert entry["held_out_samples"] == 16
    layers = tried["reconstruct"]["layers"]
    assert set(layers) <= set(small.state_dict())
    assert all(entry["damping"] is None or entry["damping"] > 0 for entry in layers.values())


def test_what_auto_compares_is_what_the_methods_do_alone() -> None:
    dense, small = pruned()
    data = samples(labels=False)
    tried = by_method(sc.repair(small, dense, data))
    for names in (("variance",), ("reconstruct", "batchnorm")):
        alone = sc.repair(small, dense, data, names)
        entries = sc.record_of(alone).repairs
        assert entries[-1]["after"] == pytest.approx(tried[" + ".join(names)]["after"])


def test_what_helps_is_kept() -> None:
    dense, small = pruned()
    repaired = sc.repair(small, dense, samples(labels=False), "batchnorm")
    (tried,) = sc.record_of(repaired).repairs
    assert tried["kept"]
    assert not torch.equal(repaired.norm1.running_mean, small.norm1.running_mean)


@pytest.mark.parametrize("labels", [True, False])
def test_what_hurts_is_taken_back(labels: bool) -> None:
    """Nothing was removed, so the statistics are right, and those of other data are not."""
    dense, _ = pruned()
    graph = sc.trace(dense, TOPOLOGIES["residual"].inputs(2, torch.float64))
    same = sc.apply(dense, plan_of(graph, {}), graph=graph)
    data = samples(labels=labels)
    foreign = [(x * 5 + 10, *rest) for x, *rest in data[:4]]
    repaired = sc.repair(same, dense, [*foreign, data[4]])
    tried = by_method(repaired)
    assert not any(entry["kept"] for entry in tried.values())
    assert tried["batchnorm"]["after"] > tried["batchnorm"]["before"]
    assert tried["reconstruct"]["why"] == NOTHING
    for name, tensor in same.state_dict().items():
        assert torch.equal(repaired.state_dict()[name], tensor), name


def test_a_repair_that_breaks_the_model_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(value: float) -> Callable[..., dict[str, Any]]:
        def run(small: nn.Module, work: Work) -> dict[str, Any]:
            with torch.no_grad():
                small.head[2].bias[0] = value
            return {}

        return run

    dense, small = pruned()
    for labels in (True, False):
        for value in (math.nan, math.inf, 1e6):
            monkeypatch.setitem(REPAIRS, "batchnorm", Repair("batchnorm", breaking(value)))
            for methods in ("batchnorm", "auto"):
                repaired = sc.repair(small, dense, samples(labels=labels), methods)
                assert not by_method(repaired)["batchnorm"]["kept"]
                assert abs(repaired.head[2].bias[0]) < 1e3


def test_methods_work_on_what_the_one_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def shift(small: nn.Module, work: Work) -> dict[str, Any]:
        seen.append(float(small.head[2].bias[0].detach()))
        with torch.no_grad():
            small.head[2].bias.copy_(dense.head[2].bias)
        return {}

    dense, small = pruned()
    small = sc.repair(small, dense, samples(), None)
    with torch.no_grad():
        small.head[2].bias.add_(torch.linspace(50, -50, 5))
    monkeypatch.setitem(REPAIRS, "shift", Repair("shift", shift))
    repaired = sc.repair(small, dense, samples(labels=False), ["shift", "shift"])
    first, second = sc.record_of(repaired).repairs
    assert (first["kept"], second["kept"]) == (True, False)
    assert second["before"] == first["after"]
    assert seen[1] == float(dense.head[2].bias[0].detach())


def test_none_and_models_without_anything_to_repair() -> None:
    dense, small = pruned()
    for methods in (None, []):
        same = sc.repair(small, dense, samples(), methods)
        assert same is not small
        assert sc.record_of(same).repairs == ()
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    graph = sc.trace(net, torch.zeros(2, 3))
    small = sc.apply(net, random_plan(graph), graph=graph)
    data = [(torch.randn(4, 3), torch.arange(4)) for _ in range(5)]
    (tried,) = sc.record_of(sc.repair(small, net, data, "batchnorm")).repairs
    assert tried == {"method": "batchnorm", "kept": False, "why": NOTHING}
    assert "why" not in by_method(sc.repair(small, net, data))["reconstruct"]


def test_data_that_cannot_feed_a_repair_leaves_the_model_as_it_is() -> None:
    net = build("mlp")
    graph = sc.trace(net, torch.zeros(2, 6, dtype=torch.float64))
    small = sc.apply(net, random_plan(graph), graph=graph)
    singles = [(torch.randn(1, 6, dtype=torch.float64), torch.tensor([i % 5])) for i in range(10)]
    repaired = sc.repair(small, net, singles, "batchnorm")
    (tried,) = sc.record_of(repaired).repairs
    assert not tried["kept"]
    assert "expected more than one value a channel" in tried["why"]
    rest = [(torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 5) for _ in range(6)] + singles[:1]
    assert "why" not in sc.record_of(sc.repair(small, net, rest, "batchnorm")).repairs[0]


def test_eight_images_are_enough_to_try() -> None:
    dense, small = pruned()
    data = [tuple(t[:8] for t in samples(1, labels=False)[0])]
    repaired = sc.repair(small, dense, data)
    tried = sc.record_of(repaired).repairs
    assert all(entry["held_out_samples"] == 8 for entry in tried)
    assert min(tried, key=lambda entry: entry["after"])["kept"]
    fresh = samples(4, labels=False, shift=0.01)
    assert sc.evaluate(repaired, fresh, dense=dense).loss < sc.evaluate(small, fresh, dense=dense).loss


def test_few_samples_judge_in_turn_and_then_all_serve_to_fit() -> None:
    dense, small = pruned()
    data = [tuple(t[:8] for t in batch) for batch in samples(4, labels=False)]
    graph = sc.trace(dense, data[0][0])
    repaired = sc.repair(small, dense, data, ["batchnorm", "reconstruct"], graph=graph)
    tried = sc.record_of(repaired).repairs
    assert all(entry["held_out_samples"] == 32 for entry in tried)
    expected = duplicate(small)
    for entry in tried:
        assert entry["kept"] == entry.get("fitted_on_all", False)
        if entry["kept"]:
            notes = REPAIRS[entry["method"]].run(expected, Work(lambda: graph, sc.Calibration.of(data)))
            assert notes is not None
            assert entry.get("layers") == notes.get("layers")
    assert any(entry["kept"] for entry in tried)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(repaired.state_dict()[name], tensor, msg=name)


def test_a_trace_at_hand_is_used_and_one_is_made_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = pruned()
    data = samples(labels=False)
    graph = sc.trace(dense, data[0][0])
    calls = []
    module = importlib.import_module("secateur.repairs.repair")
    real = module.trace_units
    monkeypatch.setattr(module, "trace_units", lambda *a, **k: calls.append(1) or real(*a, **k))
    given = sc.repair(small, dense, data, "bias", graph=graph)
    assert calls == []
    sc.repair(small, dense, data, "batchnorm")
    assert calls == []
    made = sc.repair(small, dense, data, ["bias", "variance"])
    assert calls == [1]
    assert sc.record_of(given).repairs[0] == sc.record_of(made).repairs[0]


def test_the_random_state_and_the_mode_are_left_alone() -> None:
    dense, small = pruned()
    before = torch.get_rng_state()
    repaired = sc.repair(small, dense, samples())
    assert torch.equal(before, torch.get_rng_state())
    assert not repaired.training


def test_refusals() -> None:
    dense, small = pruned()
    with pytest.raises(
        sc.SettingError,
        match=r"repair: expected None, 'auto' or names among reconstruct, .*polish, got 'magic'",
    ):
        sc.repair(small, dense, samples(), ["batchnorm", "magic"])
    with pytest.raises(sc.ArtefactError, match=r"expected a model that secateur\.apply returned"):
        sc.repair(dense, dense, samples())
    with pytest.raises(sc.CalibrationError, match="expected at least two samples"):
        sc.repair(small, dense, [])


def test_subnormals_are_flushed_but_not_those_of_half_precision() -> None:
    net = nn.Linear(2, 1)
    half = nn.Linear(2, 1).half()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1e-40, 1e-30]]))
        half.weight.copy_(torch.tensor([[1e-6, 1e-3]]))
    kept = half.weight.clone()
    flush_subnormals(net)
    flush_subnormals(half)
    assert net.weight[0, 0] == 0
    assert net.weight[0, 1] > 0
    assert torch.equal(half.weight, kept)


def test_without_any_bias_a_shift_has_nothing_to_change() -> None:
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    data = [(torch.randn(20, 4),) for _ in range(5)]
    graph = sc.trace(net, data[0][0])
    plan = sc.Uniform(0.5).allocate(graph, sc.score(graph, None, "magnitude", progress=False))
    small = sc.apply(net, plan, graph=graph)
    (entry,) = sc.record_of(sc.repair(small, net, data, "bias", graph=graph, progress=False)).repairs
    assert (entry["kept"], entry["why"]) == (False, "the model has nothing that it could change")


def test_plenty_of_data_run_all_on_a_part_and_the_best_two_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = pruned()
    data = samples(labels=False)
    every = by_method(sc.repair(small, dense, data))
    assert not any("fitted_on" in entry for entry in every.values())
    monkeypatch.setattr(trials, "FIRST_SAMPLES", 4)
    tried = by_method(sc.repair(small, dense, data))
    assert {*tried} == {*every}
    final = [name for name, entry in tried.items() if "fitted_on" not in entry]
    assert len(final) == 2
    for name in final:
        assert tried[name]["after"] == pytest.approx(every[name]["after"])
    (kept,) = (name for name, entry in tried.items() if entry["kept"])
    assert kept in final
    assert all(entry["fitted_on"] == 4 for name, entry in tried.items() if name not in final)
