"""What is written computes what the model computes; what does not is refused, and the old file stays."""

from __future__ import annotations

import builtins
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.artefact.export import onnx as onnx_files
from tests.helpers.models import TOPOLOGIES, build
from tests.targets.units.plans import random_plan

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).eval()


def answers(path: Path, x: Tensor) -> Tensor:
    """What the file gives, by its runtime alone."""
    if path.suffix == ".pt2":
        found: Tensor = torch.export.load(path).module()(x)
        return found.detach()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.as_tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("form", ["module", "graph", pytest.param("masked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_every_form_at_other_batch_sizes(tmp_path: Path, form: Any, suffix: str) -> None:
    model = build("residual", torch.float32)
    (x,) = TOPOLOGIES["residual"].inputs(4, torch.float32)
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), form, graph=graph, example_inputs=x).train()
    done = sc.export(small, tmp_path / f"small{suffix}", x)
    assert done.batches[:2] == (4, 5)
    assert done.difference <= 1e-5
    assert small.training
    small.eval()
    for batch in (1, 7):
        other = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(answers(done.path, other), small(other), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_every_way_in_which_layers_depend_on_each_other(tmp_path: Path, name: str) -> None:
    model, inputs = build(name, torch.float32), TOPOLOGIES[name].inputs(3)
    graph = sc.trace(model, inputs, allow_inexact=True)
    small = sc.apply(model, random_plan(graph), graph=graph, example_inputs=inputs)
    for suffix in (".onnx", ".pt2"):
        assert sc.export(small, tmp_path / f"small{suffix}", inputs).difference < 1e-4


class Pair(NamedTuple):
    total: Tensor
    parts: list[Tensor]


class Mixed(nn.Module):
    """Keyword inputs in another order than the signature's, a container of its own, an input passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(2, 5)

    def forward(self, a: Tensor, b: Tensor, double: bool = False) -> Pair:
        total = self.left(a) - self.right(b)
        return Pair(2 * total if double else total, [a, b * 2])


def test_names_and_containers(tmp_path: Path) -> None:
    model, inputs = Mixed().eval(), {"b": torch.randn(3, 2), "a": torch.randn(3, 3), "double": True}
    path = sc.export(model, tmp_path / "mixed.onnx", inputs).path
    session = onnxruntime.InferenceSession(path)
    assert [entry.name for entry in session.get_inputs()] == ["b", "a"]
    assert [entry.shape for entry in session.get_inputs()] == [["batch", 2], ["batch", 3]]
    assert len(session.get_outputs()) == 3
    sc.export(model, tmp_path / "mixed.pt2", inputs)
    found = torch.export.load(tmp_path / "mixed.pt2").module()(**inputs)
    assert type(found) is tuple, "a process without the class has to be able to unpack it"
    wanted = model(**inputs)
    torch.testing.assert_close([found[0], *found[1]], [wanted.total, *wanted.parts])


def test_inputs_come_from_the_plan(tmp_path: Path) -> None:
    model, x = net(), torch.randn(6, 4)
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), graph=graph, example_inputs=x)
    assert sc.export(small, tmp_path / "small.pt2").batches == (6, 7)
    with pytest.raises(sc.SettingError, match=r"expected example_inputs .* got none"):
        sc.export(model, tmp_path / "dense.pt2")


def test_a_fixed_batch_is_tried_alone(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(3, 8).relu()

    assert sc.export(Fixed(), tmp_path / "fixed.onnx", torch.randn(3, 2, 4)).batches == (3,)


def test_files_say_where_they_come_from_and_nothing_of_data_or_code(tmp_path: Path) -> None:
    model, x = net(), torch.full((3, 4), 0.7310585)
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph, example_inputs=x)
    for suffix in (".onnx", ".pt2"):
        held = sc.export(small, tmp_path / f"small{suffix}", x).path.read_bytes()
        assert x.numpy().tobytes() not in held
        assert os.fsencode(Path(__file__).parent) not in held
    metadata = onnxruntime.InferenceSession(tmp_path / "small.onnx").get_modelmeta().custom_metadata_map
    assert metadata["secateur.macs"] == str(plan.predicted.macs)
    extra = {"secateur.json": ""}
    torch.export.load(tmp_path / "small.pt2", extra_files=extra)
    assert f'"dense_macs": "{plan.dense.macs}"' in extra["secateur.json"]
    assert not [name for name in zipfile.ZipFile(tmp_path / "small.pt2").namelist() if name.endswith(".py")]


class Shy(nn.Module):
    """Answers something else while it is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + int(torch.compiler.is_compiling())


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_what_computes_something_else_is_refused_and_the_old_file_stays(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    sc.export(net(), path, torch.randn(2, 4))
    before = path.read_bytes()
    with pytest.raises(sc.ExportError, match=r"largest difference of \d") as caught:
        sc.export(Shy().eval(), path, torch.randn(2, 4))
    assert "Nothing was kept" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class Forgetful(nn.Module):
    """While it is captured, it may forget its mask, or all ids but the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(20, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.forgets = ""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            ids = ids.clamp(max=1) if self.forgets == "ids" else ids
            mask = torch.ones_like(mask) if self.forgets == "mask" else mask
        hidden = torch.relu(self.up(self.words(ids)))
        return (self.down(hidden) * mask[..., None]).sum(1)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("forgets", ["ids", "mask", ""])
def test_ids_and_padding_that_the_example_lacks_are_tried(tmp_path: Path, forgets: str, suffix: str) -> None:
    torch.manual_seed(0)
    model = Forgetful().eval()
    inputs = {"ids": torch.zeros(2, 6, dtype=torch.long), "mask": torch.ones(2, 6, dtype=torch.long)}
    graph = sc.trace(model, inputs)
    small: Any = sc.apply(model, random_plan(graph), graph=graph, example_inputs=inputs)
    small.forgets = forgets
    if not forgets:
        assert sc.export(small, tmp_path / f"net{suffix}", inputs).batches == (2, 3)
        return
    with pytest.raises(sc.ExportError, match="largest difference"):
        sc.export(small, tmp_path / f"net{suffix}", inputs)


def test_the_tolerance_decides(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 40)).eval()
    x = torch.randn(64, 300)
    found = sc.export(wide, tmp_path / "a.onnx", x)
    assert 0 < found.difference < found.tolerance == pytest.approx(3.45e-4, rel=1e-2)
    with pytest.raises(sc.ExportError, match="largest difference"):
        sc.export(wide, tmp_path / "b.onnx", x, tolerance=found.difference / 2)


@pytest.mark.parametrize("limit", [0, onnx_files.ONE_FILE_BYTES])
def test_an_interruption_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", limit)
    path, x, old, new = tmp_path / "net.onnx", torch.randn(2, 4), net(), net()
    with torch.no_grad():
        new[0].weight.add_(1)  # type: ignore[index, union-attr, operator]
    sc.export(old, path, x)
    assert (len(list(tmp_path.glob("*.data"))) == 1) == (limit == 0)
    real = os.replace

    def stop(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            sc.export(new, path, x)
    torch.testing.assert_close(answers(path, x), old(x).detach(), rtol=1e-4, atol=1e-6)
    sc.export(new, path, x)
    torch.testing.assert_close(answers(path, x), new(x).detach(), rtol=1e-4, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == (2 if limit == 0 else 1), "stale data and temporary folders go"


def test_operators_that_onnx_lacks(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j1(x)

    with pytest.raises(sc.ExportError, match=r"operators that ONNX knows.*Export to \.pt2"):
        sc.export(Bessel(), tmp_path / "bessel.onnx", torch.randn(2, 4))
    assert sc.export(Bessel(), tmp_path / "bessel.pt2", torch.randn(2, 4)).difference == 0
    assert [p.name for p in tmp_path.iterdir()] == ["bessel.pt2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_that_onnx_runtime_lacks(tmp_path: Path, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).eval().to(dtype)
    words = rf"no kernel for its operator \w+\..*in {str(dtype).removeprefix('torch.')}.*model\.float\(\)"
    with pytest.raises(sc.ExportError, match=words):
        sc.export(net, tmp_path / "net.onnx", torch.zeros(2, 4, dtype=dtype))
    assert not [*tmp_path.iterdir()]


def test_opset(tmp_path: Path) -> None:
    import onnx

    path = sc.export(net(), tmp_path / "net.onnx", torch.randn(2, 4), opset=18).path
    assert [entry.version for entry in onnx.load(path).opset_import if not entry.domain] == [18]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), torch.randn(2, 4)
    with pytest.raises(sc.SettingError, match=r"\.onnx or \.pt2"):
        sc.export(model, tmp_path / "net.tflite", x)
    with pytest.raises(sc.SettingError, match="no opset="):
        sc.export(model, tmp_path / "net.pt2", x, opset=18)
    with pytest.raises(sc.SettingError, match="no card="):
        sc.export(model, tmp_path / "net.pt2", x, card="# net")
    (tmp_path / "file").write_text("")
    with pytest.raises(sc.ExportError, match="got something else that is there already"):
        sc.export(model, tmp_path / "file" / "net.pt2", x)
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(sc.SettingError, match=r'pip install "secateur\[export\]"'):
        sc.export(model, tmp_path / "net.onnx", x)


def test_masked_single_weights(tmp_path: Path) -> None:
    data = [(torch.randn(8, 4), torch.arange(8) % 2) for _ in range(5)]
    found: Any = sc.prune(
        net(), data, sc.Budget(sparsity=0.5), granularity="weight", repair=None, progress=False
    )
    path = sc.export(found.model, tmp_path / "sparse.onnx", data[0][0]).path
    assert np.isclose(answers(path, data[1][0]), found.model(data[1][0]).detach(), rtol=1e-4, atol=1e-6).all()
