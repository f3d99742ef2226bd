"""A quantised model runs in ONNX Runtime, and its figures are those of a judge that knows neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.artefact.export.quantising import OnnxModel
from secateur.errors import CalibrationError, ExportError, SettingError
from secateur.pipeline.quantise import next_token_loss
from secateur.pipeline.quantised import QuantisedFigures

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 4),
    ).eval()


def samples(model: nn.Module, batches: int = 8) -> list[Any]:
    """Batches whose labels are the model's own classes: its accuracy is 1."""
    torch.manual_seed(1)
    inputs = [torch.randn(10, 2, 6, 6) for _ in range(batches)]
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in inputs]


def judged(content: bytes, data: list[Any]) -> tuple[float, float]:
    """Loss and accuracy by ONNX Runtime and NumPy alone."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = torch.cat([torch.as_tensor(session.run(None, {name: x.numpy()})[0]) for x, _ in data])
    labels = torch.cat([y for _, y in data])
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def operators(content: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_from_string(content).graph.node}


def test_the_figures_are_those_of_the_file(tmp_path: Path) -> None:
    model = net()
    data = samples(model)
    result = sc.prune(
        model,
        data,
        sc.Budget(macs=0.6),
        sc.Uniform(),
        evaluation=data,
        quantise="int8",
        measure_latency=False,
        progress=False,
    )
    done = result.quantised
    assert done is not None
    assert [s.stage for s in done.figures.stages] == ["dense", "pruned", "pruned + int8"]
    dense, pruned, small = done.figures.stages
    assert dense.accuracy == 1
    assert pruned.accuracy == pytest.approx(sc.evaluate(result.model, data).accuracy)
    loss, accuracy = judged(done.content, data)
    assert small.loss == pytest.approx(loss, abs=1e-5)
    assert small.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert (small.samples, done.figures.calibrated) == (80, 70)
    assert small.file_bytes == len(done.content) < pruned.file_bytes < dense.file_bytes
    assert 0 < done.figures.distance < 0.01
    (drop,) = done.figures.losses
    assert (drop.bound, drop.limit, drop.within) == ("accuracy_drop", None, None)
    assert drop.value == pytest.approx(1 - accuracy, abs=1e-6)
    assert drop.low <= drop.value <= drop.high
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(done.content)
    assert result.report.quantised == done.figures
    assert sc.Report.from_json(result.report.to_json()).quantised == done.figures
    assert result.report.asked["quantise"] == "int8"
    assert done.save(tmp_path / "small.onnx").read_bytes() == done.content
    assert torch.equal(done.model(data[0][0][:3]).argmax(1), done.model(data[0][0]).argmax(1)[:3])


def test_each_channel_has_a_scale_of_its_own() -> None:
    model = net()
    done = sc.quantise(model, samples(model), measure_latency=False)
    graph = onnx.load_from_string(done.content).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    scales = [
        values[node.input[1]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in values
    ]
    assert sum(scale.shape == (16,) for scale in scales) >= 2
    assert all(np.unique(scale).size > 1 for scale in scales if scale.size > 1)


@pytest.mark.slow
def test_a_bound_on_quality_is_looked_at_and_said() -> None:
    model = net()
    result = sc.prune(
        model,
        samples(model, 30),
        sc.Budget(accuracy_drop=0.2, confidence=0.9),
        sc.Uniform(),
        quantise="int8",
        measure_latency=False,
        progress=False,
    )
    assert result.quantised is not None
    (drop,) = result.quantised.figures.losses
    assert (drop.limit, drop.confidence) == (0.2, 0.9)
    assert drop.within is (drop.most <= 0.2)
    assert "Asked for at most 20.00 points: " in " ".join(str(result.report).split())


@pytest.mark.slow
def test_four_bits_of_a_language_model_with_its_own_loss() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(60, (40, 16))
    data = [{"input_ids": rows, "labels": rows} for rows in ids.split(4)]
    done = sc.quantise(model, data, "int4", evaluation=data, measure_latency=False)
    assert done.figures.stages[0].stage == "model"
    with torch.no_grad():
        wanted = np.mean([float(model(**batch).loss) for batch in data])
    assert done.figures.stages[0].loss == pytest.approx(wanted, rel=1e-4)
    assert done.figures.stages[1].loss != done.figures.stages[0].loss
    assert done.figures.calibrated == 0
    assert "MatMulNBits" in operators(done.content)
    assert done.figures.losses[0].bound == "loss_rise"
    assert done.model(input_ids=ids[:3]).logits.shape == (3, 16, 60)
    with pytest.raises(SettingError, match="Pass batches of one shape"):
        done.model(input_ids=ids[:3, :5])
    with pytest.raises(SettingError, match="expected 1 tensors for the inputs input_ids, got 2"):
        done.model(ids[:3], ids[:3])


def test_four_bits_of_a_small_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    data = [(torch.randn(8, 64),) for _ in range(5)]
    done = sc.quantise(model, data, "int4", measure_latency=False)
    assert "MatMulNBits" in operators(done.content)
    assert 0 < done.figures.distance < 0.1


def test_the_loss_of_next_tokens_is_that_of_transformers_and_not_of_the_same_tokens() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    ids[0, 2] = -100
    rows = [(logits[b, t], ids[b, t + 1]) for b in range(2) for t in range(4) if ids[b, t + 1] != -100]
    wanted = torch.stack([F.cross_entropy(row, label) for row, label in rows]).mean()
    found = next_token_loss(lambda input_ids: logits, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(found, wanted)


class Labelled(nn.Module):
    """Computes a loss of its own, which is neither of the known ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.second(F.relu(self.first(x)))[:, None].expand(-1, 2, -1)
        found = {"logits": logits}
        return found if labels is None else {"loss": logits.square().mean(), **found}


def test_where_only_the_model_knows_its_loss_the_distance_is_measured() -> None:
    data = [{"x": torch.randn(8, 6), "labels": torch.zeros(8, 2, dtype=torch.long)} for _ in range(6)]
    done = sc.quantise(Labelled().eval(), data, measure_latency=False)
    assert [s.measure for s in done.figures.stages] == ["distance to dense"] * 2
    assert done.figures.stages[0].loss == 0 < done.figures.stages[1].loss < 0.01


class Branches(nn.Module):
    """Linear layers with two axes of inputs, one weight used twice, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 40), nn.Linear(40, 40)
        self.last, self.other = nn.Linear(40, 3), nn.Linear(40, 5, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.second(self.second(self.first(x).relu()).relu()).relu()
        return {"logits": self.last(h), "other": self.other(h)}


def test_four_bits_of_linear_layers_with_two_axes() -> None:
    torch.manual_seed(0)
    model, data = Branches().eval(), [torch.randn(10, 8) for _ in range(6)]
    done = sc.quantise(model, data, "int4", measure_latency=False)
    found = [node.op_type for node in onnx.load_from_string(done.content).graph.node]
    assert found.count("MatMulNBits") == 5
    assert not {"Gemm", "MatMul"} & set(found)
    with torch.no_grad():
        expected, given = model(data[0]), vars(done.model(data[0]))
    for name, value in expected.items():
        assert 0 < (given[name] - value).norm() < 0.25 * value.norm()


class Logarithm(nn.Module):
    """Gives NaN for some of its inputs, which are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).log())


def test_what_would_mislead_is_refused_in_words() -> None:
    torch.manual_seed(0)
    for kind in ("int8", "int4"):
        with pytest.raises(CalibrationError, match="expected outputs of the model that are numbers"):
            sc.quantise(Logarithm().eval(), [torch.randn(10, 8) for _ in range(6)], kind)  # type: ignore[arg-type]
        sizes = [torch.randn(4, 2, 6 + (i > 0), 6) for i in range(6)]
        conv = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 40)
        ).eval()
        with pytest.raises(SettingError, match=r"\[any, 2, 6, 6\] as in the first batch.*got \[4, 2, 7, 6\]"):
            sc.quantise(conv, sizes, kind)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"expected a model in float32, got float64. Pass model.float\(\)"):
        sc.quantise(net().double(), [torch.randn(10, 2, 6, 6).double() for _ in range(4)])


def test_what_cannot_be_done_is_refused_before_scoring() -> None:
    model = net()
    data = samples(model)
    with pytest.raises(SettingError, match=r"quantise\('int2'\): expected one of int8, int4"):
        sc.prune(model, data, sc.Budget(macs=0.5), quantise="int2", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="matrix products with stored weights, got none"):
        sc.quantise(net()[:5], [(x,) for x, _ in data], "int4", measure_latency=False)  # type: ignore[index]
    with pytest.raises(SettingError, match="model on the CPU"):
        sc.quantise(nn.Linear(2, 2, device="meta"), [(torch.randn(4, 2),)] * 5)


def test_the_file_runs_where_secateur_is_not(tmp_path: Path) -> None:
    model = net()
    data = samples(model)
    done = sc.quantise(model, data, measure_latency=False)
    done.save(tmp_path / "q.onnx")
    np.save(tmp_path / "x.npy", data[0][0].numpy())
    code = (
        "import sys, numpy as np, onnxruntime as o\n"
        "s = o.InferenceSession('q.onnx', providers=['CPUExecutionProvider'])\n"
        "np.save('y.npy', s.run(None, {s.get_inputs()[0].name: np.load('x.npy')})[0])\n"
        "assert not {'torch', 'secateur'} & {*sys.modules}"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), done.model(data[0][0]).numpy())


def test_figures_refuse_what_is_none() -> None:
    with pytest.raises(ValueError, match="at least 2 items"):
        QuantisedFigures(kind="int8", runtime="", threads=1, batch=1, calibrated=0, distance=0.0, stages=())


def test_a_tuple_and_names_come_back_as_they_were() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x * 2

    from secateur.calibration import Batch
    from secateur.pipeline.quantise import Exported

    x = torch.randn(2, 3)
    exported = Exported.of(Two().eval(), Batch.of((x,)))
    one, two = OnnxModel(exported.content, exported.outputs)(x)
    torch.testing.assert_close(one, x + 1)
    torch.testing.assert_close(two, x * 2)
