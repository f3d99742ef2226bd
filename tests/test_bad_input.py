"""What goes wrong is refused by name; what is merely unusual works, and comes back as it was."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.graph.test_trace import assert_same, state_of
from tests.graph.tiny import Calls

QUICK: dict[str, Any] = {"measure_latency": False, "progress": False}


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )


def data(batches: int = 5, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 6, 6, generator=generator), torch.arange(size) % 4) for _ in range(batches)]


def prune(model: nn.Module | None = None, calibration: Any = None, *args: Any, **settings: Any) -> sc.Result:
    return sc.prune(
        net() if model is None else model,
        data() if calibration is None else calibration,
        *args,
        **QUICK | settings,
    )


@functools.cache
def usual() -> sc.Plan:
    """What the network loses when nothing is unusual."""
    return prune(None, None, sc.Budget(macs=0.7)).plan


# Calibration data


def broken(position: int, change: Callable[[Tensor, Tensor], tuple[Any, Any]]) -> list[Any]:
    batches: list[Any] = list(data())
    batches[position] = change(*batches[position])
    return batches


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "expected at least two samples, got 0"),
        (lambda: iter(()), "got a tuple_iterator that has none left"),
        (
            [(torch.zeros(0, 3, 6, 6), torch.zeros(0))] * 5,
            "expected inputs with at least one sample along axis 0",
        ),
        (
            [(x, torch.zeros(8, dtype=torch.int64)) for x, _ in data()],
            "expected samples of at least two classes, got only class 0",
        ),
        (
            broken(0, lambda x, y: (x, y + 1)),
            r"labels: expected classes from 0 to 3, which the model tells apart, got label 4",
        ),
        (broken(0, lambda x, y: (x, y - 1)), r"labels?.*got label -1"),
        (broken(1, lambda x, y: (x, y.float())), "expected integer labels, got torch.float32"),
        (broken(1, lambda x, y: (x, y[:-1])), "expected 8 labels, one a sample, got 7"),
        (
            broken(0, lambda x, y: (x * torch.nan, y)),
            "calibration batch 0: expected finite inputs, got NaN or infinity",
        ),
        (
            broken(2, lambda x, y: (x / 0, y)),
            r"calibration batch \d+: expected finite inputs, got NaN or infinity",
        ),
        (
            broken(0, lambda x, y: (x.to_sparse(), y)),
            "calibration batch 0: expected dense tensors, got one of layout torch.sparse_coo",
        ),
        (
            broken(0, lambda x, y: (torch.nested.nested_tensor(list(x), layout=torch.jagged), y)),
            "calibration batch 0: expected dense tensors, got a nested tensor",
        ),
        ([(x,) for x, _ in data()], "expected labels"),
        (
            broken(1, lambda x, y: (x[..., :1, :1], y)),
            r"model input .*: expected shape \[any, 3, 6, 6\], got \[8, 3, 1, 1\]",
        ),
        (broken(1, lambda x, y: (x[:, :2], y)), r"expected shape \[any, 3, 6, 6\], got \[8, 2, 6, 6\]"),
        (broken(1, lambda x, y: (x.double(), y)), r"expected torch\.float32, got torch\.float64"),
        (broken(1, lambda x, y: ((x, x), y)), "model inputs: expected 1 positional, got 2 positional"),
        (
            broken(1, lambda x, y: ({"input": x, "more": x}, y)),
            r"keys that are arguments of Sequential\.forward \(input\), got input, more",
        ),
        (["text"] * 5, "expected .* a tensor or a mapping, got str"),
        (3, "expected a DataLoader, a Dataset or an iterable of batches, got int"),
        ("cifar10", "expected a DataLoader, a Dataset or an iterable of batches, got str"),
    ],
    ids=(
        "empty iterator no_samples one_class above below float fewer nan inf sparse nested unlabelled shape "
        "channels dtype arguments keywords text number name"
    ).split(),
)
def test_data_that_cannot_be_used(calibration: Any, message: str) -> None:
    with pytest.raises(sc.CalibrationError, match=message):
        prune(None, calibration() if callable(calibration) else calibration, allocator="tod")


@pytest.mark.parametrize("index", [0, -1, 100])
def test_rules_that_compete_refuse_wrong_labels_too(index: int) -> None:
    """They do without labels where there are none; wrong ones are a mistake."""
    labels = torch.full((8,), index)
    with pytest.raises(sc.CalibrationError, match=r"class|label"):
        prune(None, [(x, labels) for x, _ in data()], sc.Budget(macs=0.5))


def test_an_empty_loader_by_name() -> None:
    graph = sc.trace(net(), data()[0][0])
    with pytest.raises(sc.CalibrationError, match="expected at least one batch, got an empty loader"):
        sc.score(graph, [], progress=False)
    with pytest.raises(sc.CalibrationError, match=r"signal \w+: expected calibration data"):
        sc.score(graph, None, progress=False)


def test_the_model_survives_bad_data() -> None:
    model = net().train()
    before = state_of(model)
    for calibration in (broken(3, lambda x, y: (x * torch.nan, y)), broken(2, lambda x, y: (x, y + 9))):
        with pytest.raises(sc.CalibrationError):
            prune(model, calibration)
    assert [m.training for m in model.modules()] == before["modes"]
    for name, value in before["values"].items():
        assert torch.equal(model.state_dict()[name], value)


# Models


def test_weights_that_are_not_finite() -> None:
    for name in ("0.weight", "1.running_var", "5.bias"):
        model = net()
        with torch.no_grad():
            model.state_dict()[name].view(-1)[2] = torch.nan
        with pytest.raises(sc.ScoreError, match=rf"expected finite weights, got NaN or infinity in {name}"):
            prune(model)


def test_a_model_that_overflows() -> None:
    model = net()
    with torch.no_grad():
        model[5].weight.fill_(3e38)
    with pytest.raises(
        sc.CalibrationError, match=r"model: expected finite outputs|loss: expected a finite number"
    ):
        prune(model)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(108, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(108, 1), nn.ReLU(), nn.Linear(1, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    ],
    ids=["one layer", "a single unit", "mixed only", "no parameters"],
)
def test_nothing_to_prune(model: nn.Module) -> None:
    with pytest.raises(sc.NothingToPruneError, match="to have units that can be removed, found none"):
        prune(model)


def test_all_that_could_be_pruned_is_to_be_left_alone() -> None:
    with pytest.raises(sc.NothingToPruneError, match="ignored"):
        prune(limits=sc.Limits(ignore=("*",)))


@pytest.mark.parametrize("model", [3, "resnet18", None, nn.Linear, torch.relu, {"0.weight": torch.zeros(2)}])
def test_no_model(model: Any) -> None:
    with pytest.raises(sc.SettingError, match=r"model: expected a torch\.nn\.Module, got"):
        sc.prune(model, data(), **QUICK)


def test_inputs_that_the_model_cannot_take() -> None:
    with pytest.raises(sc.CaptureError, match=r"example_inputs\) to run, got RuntimeError: Given groups=1"):
        prune(None, [(torch.randn(8, 5, 6, 6), y) for _, y in data()])


@pytest.mark.parametrize("output", [lambda y: y.tolist(), lambda y: "text", lambda y: None])
def test_outputs_that_are_no_tensors(output: Callable[[Tensor], Any]) -> None:
    with pytest.raises(sc.CaptureError, match="to return tensors, got none"):
        prune(Calls(lambda m, x: output(m.net(x)), net=net()))


def test_outputs_that_are_no_logits() -> None:
    model = Calls(lambda m, x: (m.net(x), m.net(x)), net=net())
    with pytest.raises(sc.CalibrationError, match="expected the model to return logits, got tuple"):
        prune(model)
    result = prune(model, loss_fn=lambda m, batch: nn.functional.cross_entropy(m(batch[0])[0], batch[1]))
    assert result.report.proof["outputs"] == 2


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, nn.CrossEntropyLoss()])
def test_losses_of_pytorch_take_no_model(loss: Any) -> None:
    """They take outputs and labels; called with a model and a batch, they fail in words of their own."""
    model = net()
    graph = sc.trace(model, data()[0][0])
    for call in (
        lambda: sc.score(graph, data(), "taylor", loss_fn=loss),
        lambda: sc.evaluate(model, data(), loss_fn=loss),
        lambda: prune(model, loss_fn=loss),
    ):
        with pytest.raises(sc.CalibrationError, match="expected a function of the model and a batch, got"):
            call()


# Settings


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sc.ToD(tolerance=1.5), sc.SettingError, r"ToD: expected tolerance in \[0, 1\], got 1\.5"),
        (lambda: sc.ToD(tolerance=-0.1), sc.SettingError, r"ToD: expected tolerance in \[0, 1\], got -0\.1"),
        (lambda: sc.ToD(tolerance=float("nan")), sc.SettingError, "expected tolerance in"),
        (lambda: sc.Uniform(ratio=1.0), sc.SettingError, r"Uniform: expected ratio in \[0, 1\), got 1\.0"),
        (lambda: sc.Budget(macs=1.2), sc.BudgetError, r"expected macs to be a fraction .* got 1\.2"),
        (lambda: sc.Budget(params=0), sc.BudgetError, "expected params to be a fraction .* got 0"),
        (lambda: sc.Budget(macs=-0.5), sc.BudgetError, "expected macs to be a fraction"),
        (lambda: sc.Budget(), sc.BudgetError, "expected macs or params, got neither"),
        (lambda: prune(budget=0.5), sc.BudgetError, r"expected budget to be a Budget or None, got 0\.5"),
        (
            lambda: prune(allocator="magic"),
            sc.SettingError,
            "allocator: expected one of 'auto', 'emp', .*, 'uniform', got 'magic'",
        ),
        (lambda: prune(allocator=sc.ToD), sc.SettingError, "Pass an instance"),
        (
            lambda: prune(allocator=sc.ToD(removal="magic")),
            sc.ScoreError,
            "signals: expected one of .* got 'magic'",
        ),
        (
            lambda: prune(form="sliced"),
            sc.SettingError,
            r"prune\(form='sliced'\): expected one of auto, module",
        ),
        (
            lambda: prune(repair="magic"),
            sc.SettingError,
            "repair: expected None, 'auto' or names among .*polish, got 'magic'",
        ),
        (
            lambda: prune(granularity="atom"),
            sc.SettingError,
            r"prune\(granularity='atom'\): expected one of 'unit'",
        ),
        (lambda: prune(limits=8), sc.SettingError, "expected limits to be Limits or None, got 8"),
        (
            lambda: prune(allocator="uniform"),
            sc.SettingError,
            "expected either a ratio or a budget, got neither",
        ),
        (lambda: sc.score(sc.trace(net(), data()[0][0]), data(), "magic"), sc.ScoreError, "got 'magic'"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_wrong_names_are_refused_before_the_data_is_read() -> None:
    class Untouchable:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("read")

    for setting in ({"allocator": "magic"}, {"repair": "magic"}, {"form": "magic"}, {"granularity": "magic"}):
        with pytest.raises(sc.SettingError):
            prune(None, Untouchable(), **setting)


def test_an_unreachable_budget_says_what_can_be_reached() -> None:
    with pytest.raises(sc.UnreachableBudgetError, match="smallest that the allocator reaches") as caught:
        prune(None, None, sc.Budget(macs=0.001), limits=sc.Limits(max_ratio=0.5))
    assert 0 < caught.value.smallest < 1
    result = prune(None, None, sc.Budget(macs=caught.value.smallest), limits=sc.Limits(max_ratio=0.5))
    assert result.plan.predicted.macs == pytest.approx(caught.value.smallest * result.plan.dense.macs)


# Plans and artefacts


def test_a_plan_from_another_model() -> None:
    plan = prune().plan
    wider = nn.Sequential(*net())
    wider[5] = nn.Linear(6, 5)
    for call in (
        lambda: sc.apply(wider, plan),
        lambda: sc.verify(wider, wider, plan),
        lambda: plan.check("0" * 64),
    ):
        with pytest.raises(
            sc.PlanError,
            match=r"expected the model it was made for .* got one with other parameter names or shapes",
        ):
            call()


def test_scores_from_another_model() -> None:
    scores = sc.score(sc.trace(net(), data()[0][0]), data(), progress=False)
    wider = nn.Sequential(*net())
    wider[5] = nn.Linear(6, 5)
    with pytest.raises(sc.ScoreError, match="expected scores of model"):
        sc.ToD().allocate(sc.trace(wider, data()[0][0]), scores)


def test_a_plan_that_was_edited() -> None:
    plan = prune(None, None, sc.Budget(macs=0.7)).plan
    content = json.loads(plan.to_json())
    content["groups"][0]["slices"][0]["removed"] = [99]
    with pytest.raises(
        sc.PlanError, match=r"expected positions below 6 of axis 0 of 0\.weight \(6, 3, 3, 3\), got 99"
    ):
        sc.apply(net(), sc.Plan.from_json(json.dumps(content)))
    content["groups"][0]["slices"][0] |= {"removed": [0], "axis": 7}
    with pytest.raises(sc.PlanError, match=r"expected positions below 0 of axis 7 of 0\.weight"):
        sc.apply(net(), sc.Plan.from_json(json.dumps(content)), "module")


def put(*path: Any) -> Callable[[Any], None]:
    """Set one number of a plan's JSON."""

    def change(content: Any) -> None:
        for step in path[:-2]:
            content = content[step]
        content[path[-2]] = path[-1]

    return change


@functools.cache
def plan_file() -> str:
    return prune(None, None, sc.Budget(macs=0.7), "tod").plan.to_json()


@pytest.mark.parametrize("form", ["auto", "masked", "graph"])
def test_an_unchanged_plan_is_taken(form: Any) -> None:
    plan = sc.Plan.from_json(plan_file())
    assert sc.record_of(sc.apply(net(), plan, form)).plan == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("predicted", "macs", 1), r"expected predicted macs of [\d,]+, .* got 1: the file was changed"),
        (put("predicted", "params", 1), "expected predicted params of .* got 1"),
        (put("dense", "macs", 10**6), "expected dense macs of .* got 1,000,000"),
        (put("dense", "params", 10**6), "expected dense params of .* got 1,000,000"),
        (put("groups", 0, "exact", False), "expected exact=True for group '0'"),
        (put("certificates", "groups", "0", "removed", 3), "certificate of '0' with removed [12], .* got 3"),
    ],
)
@pytest.mark.parametrize("form", ["auto", "masked", "graph"])
def test_numbers_of_a_plan_that_the_model_decides(form: Any, change: Any, message: str) -> None:
    content = json.loads(plan_file())
    change(content)
    with pytest.raises(sc.PlanError, match=message):
        sc.apply(net(), sc.Plan.from_json(json.dumps(content)), form)


def test_a_plan_is_good_at_other_sizes_and_its_parameters_are_compared_there_too() -> None:
    content = json.loads(prune(None, None, sc.Budget(macs=0.7)).plan.to_json())
    larger = torch.randn(3, 3, 9, 9)
    assert sc.apply(net(), sc.Plan.from_json(json.dumps(content)), example_inputs=larger)(larger).shape == (
        3,
        4,
    )
    put("predicted", "params", 1)(content)
    with pytest.raises(sc.PlanError, match="expected predicted params"):
        sc.apply(net(), sc.Plan.from_json(json.dumps(content)), example_inputs=larger)


def test_a_path_of_no_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = prune().model
    for call in (lambda: sc.save(small, ""), lambda: sc.export(small, "")):
        with pytest.raises(sc.SecateurError, match=r"expected a path, got ''\. Name a place"):
            call()
    assert not [*tmp_path.iterdir()]


def test_artefacts_that_are_not_what_was_written(tmp_path: Path) -> None:
    """Each in detail in test_save; here, that every kind is one clear error."""
    sc.save(prune().model, tmp_path)
    record, tensors = tmp_path / "secateur.json", tmp_path / "model.safetensors"
    good = record.read_text(), tensors.read_bytes()
    newer = json.dumps(json.loads(good[0]) | {"format": 2})
    for text, raw, message in (
        (good[0], good[1][:-5], "truncated"),
        (good[0][:-40], good[1], "no JSON"),
        (good[0].replace('"note": ""', '"note": "x"'), good[1], "altered"),
        (newer, good[1], "Upgrade secateur"),
    ):
        record.write_text(text)
        tensors.write_bytes(raw)
        with pytest.raises(sc.ArtefactError, match=message):
            sc.load(tmp_path, net)
    record.write_text(good[0])
    tensors.write_bytes(good[1])
    assert sc.record_of(sc.load(tmp_path, net)).form == "module"


# Unusual, and fine


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))],
    ids=["DataParallel", "compile", "both"],
)
@pytest.mark.filterwarnings(
    "ignore:.*script_method.*:DeprecationWarning"
)  # torch, when it loads its compiler
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    wrapped = wrap(model)
    before = state_of(model)
    result = prune(wrapped, None, sc.Budget(macs=0.7))
    assert type(result.model) is nn.Sequential
    assert result.plan == usual()
    assert_same(before, state_of(model))
    assert [g.size for g in sc.trace(wrapped, data()[0][0]).groups] == [6]
    assert sc.verify(wrapped, sc.apply(wrapped, result.plan), result.plan).difference <= 1e-9


def test_hooks_frozen_parameters_gradients_and_train_mode() -> None:
    model = net().train()
    model[1].eval()
    model[5].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    seen: list[torch.Size] = []
    model[2].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    before = state_of(model)
    result = prune(model, None, sc.Budget(macs=0.7))
    assert_same(before, state_of(model))
    assert [m.training for m in result.model] == [m.training for m in model]
    assert not result.model[5].weight.requires_grad
    seen.clear()
    result.model(data()[0][0])
    assert len(seen) == 1, "a hook is part of the model, and comes along"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    before = state_of(model)
    calibration = [(x.to(dtype), y) for x, y in data()]
    result = prune(model, calibration, sc.Budget(macs=0.7))
    assert_same(before, state_of(model))
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.model(calibration[0][0]).dtype == dtype
    assert result.report.proof["difference"] <= 1e-9


def test_tied_weights() -> None:
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(108, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Linear(8, 4),
    )
    model[5].weight = model[3].weight
    before = state_of(model)
    result = prune(model, None, sc.Budget(params=0.8))
    assert_same(before, state_of(model))
    assert result.model[5].weight is result.model[3].weight
    assert result.model[3].in_features == result.model[3].out_features < 8


def test_a_single_unit_layer_among_others() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    )
    result = prune(model, None, sc.Budget(macs=0.9))
    assert [g.name for g in result.plan.groups] == ["2"]
    assert result.model[0].out_channels == 1


def test_inputs_on_another_device_follow_the_model() -> None:
    """Moving is what a user means; on one device the other way round can only be tried without values."""
    model = net().to("meta")
    graph = sc.trace(model, data()[0][0])
    assert graph.device.type == "meta"
    plan = sc.Plan.build(graph, {"0": torch.arange(6).numpy() > 1}, allocator="test")
    small = sc.apply(model, plan, "graph", graph=graph, example_inputs=data()[0][0])
    assert small.get_parameter("0.weight").shape == (4, 3, 3, 3)
    assert small.get_parameter("0.weight").device.type == "meta"
    batch = next(iter(sc.Calibration.of(data()).to("meta")))
    assert batch.args[0].device.type == batch.labels.device.type == "meta"


def test_batches_of_different_sizes_and_a_rest_of_one() -> None:
    batches = [*data(4), *data(1, 1)]
    result = prune(None, batches, sc.Budget(macs=0.7))
    assert result.report.proof["difference"] <= 1e-9


def test_one_large_batch() -> None:
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    result = prune(None, [(x, y)], sc.Budget(macs=0.7))
    assert result.scores.samples == 32


def test_inside_no_grad_and_inference_mode() -> None:
    with torch.no_grad():
        assert prune(None, None, sc.Budget(macs=0.7)).plan == usual()
    model, calibration = net(), data()
    with torch.inference_mode():
        assert prune(model, calibration, sc.Budget(macs=0.7)).plan == usual()
