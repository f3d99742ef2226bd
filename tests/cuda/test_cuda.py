"""On a CUDA device everything gives what it gives on the CPU. ``make gpu`` runs these tests.

Without one, ``make test-device`` runs them on a device that `pretended.cpp` makes of the CPU, and
``SECATEUR_DEVICE=cpu`` tries the tests themselves.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from secateur.common import mapped
from secateur.measure.latency.timing import stopwatch
from secateur.measure.memory import memory
from secateur.repairs.methods import REPAIRS
from secateur.signals.registry import SIGNALS
from secateur.targets import weights as masks
from tests.cli.conftest import run
from tests.helpers.models import TOPOLOGIES, build
from tests.signals.data import labelled

# Warnings about the device, its kernels or its formats fail no test.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]
DEVICE = torch.device(os.environ.get("SECATEUR_DEVICE", "cuda"))
FORMS = ("module", "masked", "graph")


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip without the device; no TF32, whose products have 10 bits."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if DEVICE.type == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def there(data: Any) -> Any:
    """The same data on the device."""
    return [tuple(t.to(DEVICE) for t in batch) for batch in data]


def pruned(model: nn.Module, data: Any, form: Any = "module") -> tuple[nn.Module, sc.Graph, sc.Plan]:
    """Half of the units of each group gone, by magnitude."""
    graph = sc.trace(model, data[0][0])
    plan = sc.Uniform(ratio=0.5).allocate(graph, sc.score(graph, None, "magnitude", progress=False))
    return sc.apply(model, plan, graph=graph, form=form), graph, plan


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["residual", "separable", "gated", "lstm", "conv3d", "unet"])
def test_removal_is_proven_and_equals_that_on_the_cpu(name: str, form: str) -> None:
    model, x = build(name), TOPOLOGIES[name].inputs(6, torch.float64, 0)
    data = [tuple(x)]
    here, _, _ = pruned(model, data, form)
    moved = deepcopy(model).to(DEVICE)
    on_device = there(data)
    small, _, plan = pruned(moved, on_device, form)
    assert {t.device.type for t in small.state_dict().values()} == {DEVICE.type}
    assert sc.verify(moved, small, plan, on_device[0]).proven
    torch.testing.assert_close(small(*on_device[0]).cpu(), here(*data[0]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["residual", "mlp", "conv1d"])
def test_signals_equal_those_on_the_cpu(name: str) -> None:
    model, data = build(name), labelled(name)
    found = []
    for net, batches in ((model, data), (deepcopy(model).to(DEVICE), there(data))):
        graph = sc.trace(net, batches[0][0])
        asked = [s for s in SIGNALS if s != "batchnorm_scale" or name == "residual"]
        found.append({s: scored(graph, batches, s) for s in asked})
    for signal, expected in found[0].items():
        if isinstance(expected, str):
            assert found[1][signal] == expected, signal
            continue
        for group, vector in expected.items():
            np.testing.assert_allclose(found[1][signal][group], vector, rtol=1e-6, atol=1e-9, err_msg=signal)


def scored(graph: sc.Graph, data: Any, signal: str) -> Any:
    """The scores of a signal, or the kind of the error: a topology may lack what a signal reads."""
    try:
        return dict(sc.score(graph, data, signal, progress=False)[signal])
    except sc.SecateurError as error:
        return type(error).__name__


@pytest.mark.parametrize("method", [name for name in REPAIRS if name != "polish"])
def test_repairs_equal_those_on_the_cpu(method: str) -> None:
    torch.manual_seed(0)
    model = build("residual")
    shape = labelled("residual")[0][0].shape[1:]
    data = [(torch.randn(12, *shape, dtype=torch.float64),) for _ in range(12)]
    found = []
    for net, batches in ((model, data), (deepcopy(model).to(DEVICE), there(data))):
        small, graph, _ = pruned(net, batches)
        fixed = sc.repair(small, net, batches, method, graph=graph, progress=False)
        found.append(sc.evaluate(fixed, batches, dense=net, progress=False).loss)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_prune_in_one_call_and_back_from_disk(tmp_path: Path) -> None:
    model = build("residual", torch.float32).to(DEVICE)
    data = there(labelled("residual", (24, 24, 24), torch.float32))
    result = sc.prune(model, data, budget=sc.Budget(macs=0.6), progress=False)
    assert {t.device.type for t in result.model.state_dict().values()} == {DEVICE.type}
    sc.save(result.model, tmp_path / "small")
    again = sc.load(tmp_path / "small", lambda: build("residual", torch.float32))
    x = data[0][0]
    torch.testing.assert_close(again.to(DEVICE)(x), result.model(x), rtol=1e-5, atol=1e-6)


def test_halves_and_autocast() -> None:
    model = build("residual", torch.float32).to(DEVICE)
    data = there(labelled("residual", dtype=torch.float32))
    small, _, _ = pruned(model, data)
    x = data[0][0]
    with torch.no_grad():
        expected = small(x)
        kind = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16
        torch.testing.assert_close(deepcopy(small).to(kind)(x.to(kind)).float(), expected, rtol=0.1, atol=0.1)
        with torch.autocast(DEVICE.type, kind):
            torch.testing.assert_close(small(x).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the CPU has no such format")
def test_two_four_weights_are_multiplied_by_hardware() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).half().to(DEVICE)
    weights = sc.trace(model, granularity="weight")
    small = sc.apply(model, sc.Pattern(2, 4).allocate(weights, sc.score(weights, progress=False)))
    x = torch.randn(32, 128, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        expected = small(x)
        assert masks.to_semi_structured(small) == ("0.weight",)  # 10 rows are not what the format takes
        assert "SparseSemiStructured" in type(small[0].weight).__name__
        torch.testing.assert_close(small(x), expected, rtol=1e-2, atol=1e-2)


class Products(TorchDispatchMode):
    """Counts the products of matrices by the type of their device."""

    def __init__(self) -> None:
        super().__init__()
        self.on: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.on[result.device.type] += 1
        return result


@pytest.mark.parametrize("signals", ["reconstruction", "wanda", "fisher", "taylor"])
@pytest.mark.parametrize("place", ["memory", "files"])
def test_the_device_computes_for_a_model_that_stays_where_it_is(
    place: str, signals: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and repairs are those of the CPU, and the device makes the products over the data."""
    monkeypatch.setattr(mapped, "SMALL", 64)
    torch.manual_seed(0)
    model = Attention().eval()
    data = [torch.randint(31, (8, length)) for length in (9, 12, 9, 7) * 4]
    if place == "files":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        model = sc.map_weights(model, tmp_path)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return model(ids).square().mean()

    def run() -> tuple[sc.Scores, nn.Module]:
        graph = sc.trace(model, data[0])
        scores = sc.score(graph, data, signals, loss_fn=loss, progress=False)
        plan = sc.Uniform(ratio=0.25, removal=signals).allocate(graph, scores)
        small = sc.apply(model, plan, graph=graph)
        return scores, sc.repair(small, model, data, ["reconstruct", "bias"], graph=graph, progress=False)

    expected, wanted = run()
    with Products() as products, sc.compute_on(DEVICE):
        found, small = run()
    for group, vector in expected[signals].items():
        np.testing.assert_allclose(found[signals][group], vector, rtol=1e-4, atol=1e-9)
    assert {t.device.type for t in small.state_dict().values()} == {"cpu"}
    torch.testing.assert_close(small(data[0]), wanted(data[0]), rtol=1e-4, atol=1e-5)
    assert products.on[DEVICE.type] > 3 * (products.on["cpu"] if DEVICE.type != "cpu" else 0)


@pytest.mark.parametrize(
    "method", ["batchnorm", "bias", "variance", "layerwise", "channelwise", "reconstruct"]
)
def test_repairs_are_those_of_the_cpu_where_the_device_computes(method: str) -> None:
    model, data = build("residual", torch.float32), labelled("residual", dtype=torch.float32)
    small, graph, _ = pruned(model, data)

    def run() -> nn.Module:
        return sc.repair(small, model, data, [method], graph=graph, progress=False)

    expected = run()
    with sc.compute_on(DEVICE):
        found = run()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_what_an_operator_writes_into_decides_where_it_runs() -> None:
    here, there = torch.ones(3), torch.full((3,), 2.0, device=DEVICE)
    with sc.compute_on(DEVICE):
        total, product = torch.zeros(3), torch.zeros(3, device=DEVICE)
        total += there
        torch.mul(here, there, out=product)
        mean = torch.add(there, here)
    assert total.device.type == "cpu"
    assert total.tolist() == product.tolist() == [2.0] * 3
    assert (mean.device.type, mean.tolist()) == (DEVICE.type, [3.0] * 3)


@pytest.mark.parametrize("spread", ["mapped", "offloaded"])
def test_weights_that_wait_elsewhere(spread: str, tmp_path: Path) -> None:
    """In files, or on the CPU behind Accelerate's hooks that compute on the device: the same model."""
    torch.manual_seed(0)
    model = Attention().eval()
    data = [torch.randint(31, (8, length)) for length in (9, 12, 9, 7) * 4]
    options: dict[str, Any] = {
        "budget": sc.Budget(params=0.8),
        "allocator": "repair_aware",
        "progress": False,
    }
    expected = sc.prune(deepcopy(model), data, **options)
    if spread == "mapped":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        there = sc.map_weights(Attention().eval(), tmp_path)
    else:
        accelerate = pytest.importorskip("accelerate")
        there = accelerate.cpu_offload(deepcopy(model), execution_device=DEVICE)
    found = sc.prune(there, data, **options)
    assert {t.device.type for t in found.model.state_dict().values()} == {"cpu"}
    torch.testing.assert_close(found.model(data[0]), expected.model(data[0]), rtol=1e-4, atol=1e-5)


def test_the_command_computes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))\n"
        "def load():\n"
        "    torch.manual_seed(1)\n"
        "    return [(torch.randn(16, 6), torch.arange(16) % 4) for _ in range(8)]\n"
    )
    arguments = ["prune", "--model", "net.py:make", "--data", "net.py:load", "--macs", "0.5", "--json"]
    reports = []
    for out, more in (("here", []), ("there", ["--device", str(DEVICE)])):
        with Products() as products:
            result = run(*arguments, "--out", out, *more)
        assert result.exit_code == 0, result.stderr
        assert products.on[DEVICE.type if more else "cpu"]
        reports.append(json.loads(result.stdout))
    here, there = (report["figures"][1]["accuracy"] for report in reports)
    assert there == pytest.approx(here, abs=1e-6)


def test_training_goes_on() -> None:
    model = build("residual", torch.float32).to(DEVICE)
    data = there(labelled("residual", dtype=torch.float32))
    small, _, _ = pruned(model, data)
    tuned = sc.recover(small, model, data, epochs=1, learning_rate=0.001, progress=False)
    assert {p.device.type for p in tuned.parameters()} == {DEVICE.type}
    assert any(not torch.equal(a, b) for a, b in zip(small.parameters(), tuned.parameters(), strict=True))


def test_latency_is_measured_on_the_device() -> None:
    model = build("residual", torch.float32).to(DEVICE)
    data = there(labelled("residual", dtype=torch.float32))
    small, _, _ = pruned(model, data)
    found = sc.bench(model, small, data[0][0], batches=(1, 8), rounds=5)
    assert found.device.startswith(DEVICE.type)
    assert not found.failed
    assert all(second > 0 for row in found.rows for second in row.pruned.seconds)


def test_one_process_of_a_group_gives_what_none_gives(tmp_path: Path) -> None:
    model = build("residual").to(DEVICE)
    data = there(labelled("residual"))
    graph = sc.trace(model, data[0][0])
    expected = sc.score(graph, data, "reconstruction", progress=False)["reconstruction"]
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = sc.score(graph, data, "reconstruction", progress=False)["reconstruction"]
    finally:
        dist.destroy_process_group()
    for group, vector in expected.items():
        np.testing.assert_allclose(found[group], vector, rtol=1e-12)


class Attention(nn.Module):
    """One layer of attention and an MLP, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_lengths_that_differ_from_batch_to_batch() -> None:
    torch.manual_seed(0)
    model = Attention().eval().to(DEVICE)
    data = [torch.randint(31, (8, length), device=DEVICE) for length in (9, 12, 9, 7) * 4]
    result = sc.prune(model, data, budget=sc.Budget(params=0.8), allocator="repair_aware", progress=False)
    for length in (5, 20):
        assert result.model(torch.randint(31, (2, length), device=DEVICE)).shape == (2, length, 16)


def test_time_and_memory_of_the_device() -> None:
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).eval().to(DEVICE)
    x = torch.randn(128, 64, device=DEVICE)
    assert stopwatch((x,))(lambda: net(x)) > 0
    found = memory(net, (x,))
    if DEVICE.type in ("cpu", "cuda"):  # a pretended device counts nothing of its own
        assert found.activations >= 4 * 128 * (64 + 2 * 256)  # its allocator takes blocks, so it may be more
    data = [(torch.randn(128, 64), torch.arange(128) % 8) for _ in range(5)]
    budget = sc.Budget(memory=0.7, batch=128, device=str(DEVICE))
    result = sc.prune(net.cpu(), data, budget, "uniform", repair=None, progress=False)
    assert memory(result.model.to(DEVICE), (x,)).total <= 0.7 * memory(net.to(DEVICE), (x,)).total
