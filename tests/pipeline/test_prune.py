"""The whole pipeline in one call."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.signals.units.combination import name_of
from secateur.targets.units.apply import Applier
from secateur.targets.units.compare import relative_difference, run
from tests.graph.test_trace import assert_same, state_of
from tests.helpers.models import CLASSES, INEXACT, TOPOLOGIES, build
from tests.signals.data import labelled

QUICK: dict[str, Any] = {"measure_latency": False, "progress": False}


def loader(name: str = "residual", *, labels: bool = True) -> DataLoader[Any]:
    """Sixty inputs of a topology in five shuffled batches; of each class as many."""
    inputs = TOPOLOGIES[name].inputs(60, torch.float32, seed=5)
    classes = torch.arange(60) % CLASSES
    if name == "lstm":
        classes = (inputs[0] + classes[:, None]) % CLASSES  # a class for each word
    data = TensorDataset(*inputs, classes) if labels else TensorDataset(*inputs)
    return DataLoader(data, 12, shuffle=True)


def test_every_step_of_the_pipeline() -> None:
    model = build("residual", torch.float32)
    result = sc.prune(model, loader(), sc.Budget(macs=0.6), progress=False)
    assert isinstance(result.model, type(model))
    assert result.plan.predicted.macs <= 0.6 * result.plan.dense.macs
    assert result.graph.cost(result.plan.keep) == sc.Cost(
        result.plan.predicted.params, result.plan.predicted.macs
    )
    assert sum(p.numel() for p in result.model.parameters()) == result.plan.predicted.params
    assert result.scores.samples == 48
    assert set(result.scores.values) == {
        name_of(s) for rule in sc.Auto().rules.values() for s in rule.signals
    }
    assert {h.signal for layer in result.report.layers for h in layer.scores} == {
        result.plan.settings[use] for use in ("removal", "protection") if use in result.plan.settings
    }
    record = sc.record_of(result.model)
    assert record.plan == result.plan
    report = result.report
    assert report.proof["difference"] <= 1e-9
    assert report.proof["reference"] == "masked"
    assert [f.stage for f in report.figures[:2]] == ["dense", "pruned"]
    assert 0 <= report.figures[0].accuracy <= 1
    assert all(f.latency is not None and f.latency > 0 for f in report.figures)
    assert report.figures[1].weight_bytes < report.figures[0].weight_bytes
    assert set(report.seconds) >= {"trace", "score", "allocate", "apply", "verify", "repair", "measure"}
    assert {layer.group: (layer.kept, layer.total) for layer in report.layers} == {
        g.name: (g.kept, g.size) for g in result.plan.groups
    }
    assert ("head.2.weight axis 0", "model output") in {(k.what, k.reason) for k in report.untouched}
    assert report.settings == result.plan.settings
    assert str(result) == str(report)
    assert len(repr(result)) < len(repr(result.model)) + 200  # not the arrays
    assert report.asked["budget"] == {"macs": 0.6}


@pytest.mark.parametrize("allocator", ["tod", sc.Uniform(removal="wasserstein"), sc.ToD(removal="magnitude")])
def test_the_same_seed_gives_the_same_bytes(allocator: Any) -> None:
    texts = []
    for _ in range(2):
        torch.rand(7)  # what happens around it does not matter
        result = sc.prune(build("residual", torch.float32), loader(), sc.Budget(macs=0.7), allocator, **QUICK)
        texts.append((result.plan.to_json(), {k: v.clone() for k, v in result.model.state_dict().items()}))
    assert texts[0][0] == texts[1][0]
    for key, value in texts[0][1].items():
        assert torch.equal(value, texts[1][1][key])


def test_another_seed_gives_other_batches() -> None:
    model = build("residual", torch.float32)
    one, other = (sc.prune(model, loader(), sc.Budget(macs=0.7), "tod", seed=s, **QUICK) for s in (0, 1))
    assert one.plan.seed == 0
    assert other.plan.seed == 1
    name = one.graph.groups[0].name
    assert one.scores["taylor"][name].tolist() != other.scores["taylor"][name].tolist()


@pytest.mark.parametrize(
    "budget", [sc.Budget(macs=0.5), sc.Budget(params=0.4), sc.Budget(macs=0.8, params=0.5)]
)
@pytest.mark.parametrize("allocator", ["tod", "uniform"])
def test_budgets_are_met(budget: sc.Budget, allocator: str) -> None:
    result = sc.prune(
        build("concat", torch.float32), loader("concat"), budget, allocator, repair=None, **QUICK
    )
    plan, figures = result.plan, result.report.figures
    dense = sc.Cost(plan.dense.params, plan.dense.macs)
    assert budget.met(sc.Cost(plan.predicted.params, plan.predicted.macs), dense)
    assert (figures[1].params, figures[1].macs) == (plan.predicted.params, plan.predicted.macs)


def test_the_model_is_left_as_it_was() -> None:
    model = build("mlp", torch.float32).train()
    model[0].weight.requires_grad_(False)
    model[8].bias.grad = torch.ones(CLASSES)
    model[1].register_forward_hook(lambda m, args, out: None)
    before = state_of(model)
    result = sc.prune(model, loader("mlp"), sc.Budget(macs=0.7), progress=False)
    assert_same(before, state_of(model))
    assert result.model.training
    assert not result.model[0].weight.requires_grad


@pytest.mark.parametrize(
    "name", ["conv1d", "lstm", "multi_input", "gated", "hard_coded_view", "unknown_operator", "tied_linear"]
)
def test_kinds_of_networks(name: str) -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        *inputs, classes = batch
        return nn.functional.cross_entropy(model(*inputs).flatten(0, -2), classes.flatten())

    data = [tuple(b) for b in loader(name)]
    if name in ("multi_input", "lstm"):
        batches: Any = [(tuple(inputs), classes) for *inputs, classes in data]
    else:
        batches = data
    extra = {"loss_fn": lambda model, batch: loss_fn(model, (*batch[0], batch[1]))} if name == "lstm" else {}
    allocator = sc.Uniform(removal="magnitude") if name == "lstm" else "tod"
    result = sc.prune(build(name, torch.float32), batches, sc.Budget(params=0.8), allocator, **extra, **QUICK)
    assert result.plan.predicted.params <= 0.8 * result.plan.dense.params
    assert result.report.proof["difference"] <= 1e-9
    assert result.report.form == "module"


@pytest.mark.parametrize("name", sorted(INEXACT))
def test_inexact_groups_only_where_asked_for(name: str) -> None:
    model = build(name, torch.float32)
    exact = sc.prune(model, loader(name), allocator=sc.Uniform(ratio=0.5), **QUICK)
    loose = sc.prune(model, loader(name), allocator=sc.Uniform(ratio=0.5), allow_inexact=True, **QUICK)
    assert exact.report.proof["reference"] == "masked"
    assert len(loose.plan.groups) >= len(exact.plan.groups)
    if name == "layer_norm":
        assert [g.name for g in exact.plan.groups] == ["3"]
        assert ("0", loose.report.proof["reference"]) == (loose.plan.groups[0].name, "graph")


def test_data_without_labels_or_none_at_all() -> None:
    model = build("plain", torch.float32)
    result = sc.prune(model, loader("plain", labels=False), allocator=sc.Uniform(ratio=0.3), **QUICK)
    assert result.report.figures[1].measure == "distance to dense"
    assert result.report.figures[0].loss == 0.0
    assert result.report.figures[1].accuracy is None


def test_a_loss_of_ones_own() -> None:
    calls = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        calls.append(type(batch))
        return model(batch[0]).square().mean()

    result = sc.prune(
        build("plain", torch.float32),
        loader("plain"),
        allocator=sc.Uniform(ratio=0.3, removal="taylor"),
        loss_fn=loss_fn,
        **QUICK,
    )
    assert calls
    assert result.report.figures[0].accuracy is None
    assert math.isfinite(result.report.figures[0].loss)


def test_mapping_batches() -> None:
    inputs = TOPOLOGIES["multi_input"].inputs(20, torch.float32)
    batches = [
        {"image": inputs[0][i : i + 4], "vector": inputs[1][i : i + 4], "label": torch.arange(4)}
        for i in range(0, 20, 4)
    ]
    result = sc.prune(build("multi_input", torch.float32), batches, allocator=sc.Uniform(ratio=0.3), **QUICK)
    assert list(result.plan.inputs.kwargs) == ["image", "vector"]
    keywords = {"image": inputs[0], "vector": inputs[1]}
    assert run(result.model, (), keywords)[0].shape == (20, CLASSES)


def test_limits_and_groups_to_leave_alone() -> None:
    limits = sc.Limits(round_to=2, ignore=("stem*",))
    result = sc.prune(
        build("residual", torch.float32), loader(), allocator=sc.Uniform(ratio=0.4), limits=limits, **QUICK
    )
    kept = {g.name: g.kept for g in result.plan.groups}
    assert kept["stem.0"] == 8
    assert all(k % 2 == 0 or k == g.size for k, g in zip(kept.values(), result.plan.groups, strict=True))


def test_repair_is_judged_on_what_it_did_not_see() -> None:
    model = build("residual", torch.float32)
    result = sc.prune(model, loader(), allocator=sc.Uniform(ratio=0.4), **QUICK)
    tried = result.report.repairs
    stages = [f.stage for f in result.report.figures]
    kept = any(entry["kept"] for entry in tried)
    assert stages == (["dense", "pruned", "repaired"] if kept else ["dense", "pruned"])
    assert all(entry["after"] <= entry["before"] for entry in tried if entry["kept"])
    assert {entry["measure"] for entry in tried} == {"distance to dense"}
    assert {entry["held_out_samples"] for entry in tried} == {12}
    bare = sc.prune(model, loader(), allocator=sc.Uniform(ratio=0.4), repair=None, **QUICK)
    assert bare.report.repairs == ()
    assert (
        relative_difference(
            run(bare.model, TOPOLOGIES["residual"].inputs(2, torch.float32), {}),
            run(sc.apply(model, bare.plan), TOPOLOGIES["residual"].inputs(2, torch.float32), {}),
        )
        == 0.0
    )


def test_other_data_to_evaluate_on() -> None:
    evaluation = [(torch.randn(5, 3, 8, 8), torch.arange(5))]
    result = sc.prune(
        build("residual", torch.float32),
        loader(),
        allocator=sc.Uniform(ratio=0.3),
        evaluation=evaluation,
        **QUICK,
    )
    assert result.report.judged_on == "evaluation data"
    assert result.report.figures[0].loss == pytest.approx(
        sc.evaluate(build("residual", torch.float32), evaluation).loss
    )


@pytest.mark.parametrize("form", ["module", "graph", "masked"])
def test_forms(form: Any) -> None:
    result = sc.prune(
        build("plain", torch.float32), loader("plain"), allocator=sc.Uniform(ratio=0.3), form=form, **QUICK
    )
    assert result.report.form == form == sc.record_of(result.model).form


@pytest.mark.parametrize("leaves", ["graph", "leave"])
def test_what_apply_leaves_whole_is_whole_in_the_plan_and_the_report(
    leaves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = build("plain", torch.float32), []

    true = Applier.__call__

    def leaving(self: Applier, plan: sc.Plan, form: Any, **given: Any) -> nn.Module:
        asked.append(given["on_unrealisable"])
        rest = {name: keep for name, keep in plan.keep.items() if name == "2"}
        return true(self, sc.Plan.build(self.graph, rest, allocator="uniform", seed=0), form, **given)

    monkeypatch.setattr(Applier, "__call__", leaving)
    result = sc.prune(
        model, loader("plain"), allocator=sc.Uniform(ratio=0.5), on_unrealisable=leaves, **QUICK
    )
    assert set(asked) == {leaves}
    assert [g.name for g in result.plan.groups if g.kept < g.size] == ["2"]
    assert result.plan == sc.record_of(result.model).plan
    assert [layer.kept for layer in result.report.layers] == [g.kept for g in result.plan.groups]
    assert result.report.figures[1].params == sum(p.numel() for p in result.model.parameters())
    with pytest.raises(sc.SettingError, match="expected 'graph' or 'leave'"):
        sc.prune(model, loader("plain"), on_unrealisable="whole", **QUICK)  # type: ignore[arg-type]


def test_the_report_as_json_and_text(tmp_path: Path) -> None:
    result = sc.prune(build("residual", torch.float32), loader(), sc.Budget(macs=0.6), **QUICK)
    text = result.report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    content = json.loads(text)
    assert content["model"] == "Residual"
    assert content["figures"][0]["params"] == result.plan.dense.params
    assert sc.Report.model_validate_json(text) == result.report
    assert "Residual" in str(result.report)


def test_nothing_is_printed_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    sc.prune(build("plain", torch.float32), loader("plain"), sc.Budget(macs=0.7), progress=True)
    assert capsys.readouterr() == ("", "")


def test_a_plan_by_any_object_with_the_right_methods() -> None:
    class Halves:
        signals = ("magnitude",)

        def allocate(
            self, graph: Any, scores: Any, budget: Any = None, limits: Any = None, seed: int = 0
        ) -> sc.Plan:
            return sc.Uniform(ratio=0.5).allocate(graph, scores)

    result = sc.prune(build("plain", torch.float32), loader("plain"), allocator=Halves(), **QUICK)
    assert {g.kept for g in result.plan.groups} == {4, 5, 3}


def test_saved_and_loaded(tmp_path: Path) -> None:
    result = sc.prune(build("residual", torch.float32), loader(), sc.Budget(macs=0.6), **QUICK)
    back = sc.load(sc.save(result.model, tmp_path), lambda: build("residual", torch.float32, seed=3))
    inputs = TOPOLOGIES["residual"].inputs(3, torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(run(back, inputs, {}), run(result.model, inputs, {}), strict=True)
    )


@pytest.mark.parametrize("rule", ["tod", "repair_aware"])
def test_a_plan_file_does_not_depend_on_the_number_of_threads(rule: str) -> None:
    def made(threads: int) -> str:
        torch.set_num_threads(threads)
        try:
            data = labelled("residual", (8, 8, 8, 8, 8), torch.float32)
            settings: Any = {"repair": None, "measure_latency": False, "progress": False}
            return sc.prune(
                build("residual", torch.float32), data, sc.Budget(macs=0.6), rule, **settings
            ).plan.to_json()
        finally:
            torch.set_num_threads(1)

    assert made(1) == made(2)
