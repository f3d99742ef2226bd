"""`sc.recover` with the real Accelerate, on the CPU: alone, in bf16, with accumulation, in two processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import seeded
from secateur.common.accelerating import ProcessGroup
from tests.graph.test_trace import assert_same, state_of
from tests.helpers.models import TOPOLOGIES, build
from tests.pipeline.test_recover import data, pruned
from tests.targets.units.plans import random_plan

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    """Makes Accelerators; what they share in the process is forgotten before and after."""

    def forget() -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    forget()
    yield lambda **settings: accelerate.Accelerator(cpu=True, **settings)
    forget()


def literal(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int, every: int, rate: float
) -> nn.Module:
    """A plain loop: the gradient of the mean loss of `every` batches, the last step of an epoch fewer."""
    model = sc.repair(model, model, batches, None).train()
    steps = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    windows = [batches[i : i + every] for i in range(0, len(batches), every)]
    done, total = 0, epochs * len(windows)
    with seeded(0):
        for window in windows * epochs:
            steps.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done / total)) / 2
            steps.zero_grad()
            for x, labels in window:
                (nn.functional.cross_entropy(model(x), labels) / every).backward()
            steps.step()
            done += 1
    return model


def assert_close(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-10) -> None:
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=tolerance, atol=tolerance)


def assert_plain(tuned: nn.Module, small: nn.Module) -> None:
    """Nothing that Accelerate put there is left."""
    assert isinstance(tuned, torch.fx.GraphModule) or type(tuned) is type(small)
    assert set(vars(tuned)) == set(vars(small))
    assert sc.record_of(tuned) == sc.record_of(small)
    assert [m.training for m in tuned.modules()] == [m.training for m in small.modules()]
    assert [(n, p.dtype) for n, p in tuned.named_parameters()] == [
        (n, p.dtype) for n, p in small.named_parameters()
    ]


@pytest.mark.parametrize("form", ["module", "graph", "masked"])
def test_one_process_gives_what_none_gives(form: str, accelerator: Callable[..., Any]) -> None:
    dense, small = pruned(form)
    before, teacher = state_of(small), state_of(dense)
    tuned = sc.recover(small, dense, data(), accelerator=accelerator())
    assert_same(before, state_of(small))
    assert_same(teacher, state_of(dense))
    assert_plain(tuned, small)
    plain = sc.recover(small, dense, data())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in tuned.state_dict().items())
    assert not torch.equal(next(tuned.parameters()), next(small.parameters()))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_loop_is_the_literal_one(every: int, accelerator: Callable[..., Any]) -> None:
    """Five batches: with two or three to a step, the last step of each epoch has fewer."""
    _, small = pruned()
    given: Any = data(5)
    processes = accelerator(gradient_accumulation_steps=every)
    tuned = sc.recover(small, None, given, epochs=2, learning_rate=0.05, accelerator=processes)
    assert_close(tuned, literal(small, given, 2, every, 0.05))
    with pytest.raises(AssertionError):
        assert_close(tuned, literal(small, given, 2, every + 1, 0.05))
    assert processes.sync_gradients


@pytest.mark.parametrize("form", ["module", "masked"])
def test_bf16(form: str, accelerator: Callable[..., Any]) -> None:
    dense = build("residual").float()
    graph = sc.trace(dense, torch.zeros(2, 3, 8, 8))
    small = sc.apply(dense, random_plan(graph, 0.3), form, graph=graph)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    given = [(torch.randn(16, 3, 8, 8, generator=generator),) for _ in range(3)]
    seen = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output.dtype)

    start = sc.repair(small, dense, given, None)  # a copy, which takes its hooks along
    next(m for m in start.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(watch)
    tuned = sc.recover(start, dense, given, accelerator=accelerator(mixed_precision="bf16"))
    assert seen == [torch.bfloat16] * 6
    assert_plain(tuned, small)
    assert tuned(given[0][0]).dtype == torch.float32
    plain = sc.recover(small, dense, given)
    for name, tensor in plain.named_parameters():
        moved = tensor - small.get_parameter(name)
        off = tuned.get_parameter(name) - tensor
        assert off.norm() <= 0.2 * moved.norm() + 1e-6, name
        if form == "masked" and tensor.ndim > 1:
            assert (tuned.get_parameter(name)[small.get_parameter(name) == 0] == 0).all()
    ours, theirs = (sc.evaluate(m, given, dense=dense).loss for m in (tuned, plain))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_zeros_of_a_mask_stay_with_accumulation(accelerator: Callable[..., Any]) -> None:
    dense, small = pruned("masked")
    processes = accelerator(gradient_accumulation_steps=3)
    tuned = sc.recover(small, dense, data(), epochs=1, accelerator=processes)
    counted = 0
    for name, tensor in small.named_parameters():
        if tensor.ndim > 1:
            counted += int((tensor == 0).sum())
            assert (tuned.get_parameter(name)[tensor == 0] == 0).all()
            assert not torch.equal(tuned.get_parameter(name), tensor)
    assert counted


def test_what_comes_back_can_be_saved_and_repaired(accelerator: Callable[..., Any], tmp_path: Path) -> None:
    dense, small = pruned()
    tuned = sc.recover(small, dense, data(), accelerator=accelerator(mixed_precision="bf16"))
    sc.save(tuned, tmp_path)
    again = sc.load(tmp_path, lambda: build("mlp"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tuned.state_dict().items())
    assert sc.record_of(sc.repair(tuned, dense, data(), "bias")).repairs


def test_models_that_are_sharded_are_refused(
    accelerator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = pruned()
    processes = accelerator()
    kind = accelerate.utils.DistributedType.FSDP
    monkeypatch.setattr(type(processes), "distributed_type", kind)
    with pytest.raises(sc.SettingError, match=r"whole model in each process, got FSDP\. Make one"):
        sc.recover(small, dense, data(), accelerator=processes)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_shares_cover_everything_and_are_alike_in_length(size: int, count: int, every: int) -> None:
    batches = sc.Calibration.of([torch.full((2, 1), float(i)) for i in range(count)])
    found = []
    for rank in range(size):
        processes = ProcessGroup(None, rank, size, every)
        shared = list(processes.share(batches, count, "", False))
        found.append([int(batch.args[0][0]) for batch, _ in shared])
        updates = [update for _, update in shared]
        assert sum(updates) == processes.updates(count)
        assert updates[-1]
        assert all(update == ((i + 1) % every == 0) for i, update in enumerate(updates[:-1]))
    rounds = math.ceil(count / size)
    assert {len(share) for share in found} == {rounds}
    in_order = [found[i % size][i // size] for i in range(rounds * size)]
    assert in_order == [i % count for i in range(rounds * size)]


_PROGRAM = """
import sys
import accelerate, torch
import secateur as sc
from tests.common.test_accelerating import task

every, prepared, path = int(sys.argv[1]), sys.argv[2] == "prepared", sys.argv[3]
processes = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=every)
assert processes.num_processes == 2
for name in ("gated", "residual"):
    dense, small, given = task(name)
    if prepared:
        rows = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*given)))
        given = processes.prepare(torch.utils.data.DataLoader(rows, batch_size=8))
    tuned = sc.recover(small, None, given, epochs=2, learning_rate=0.05, accelerator=processes)
    torch.save(tuned.state_dict(), f"{path}/{name}{processes.process_index}")
"""


def task(name: str) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network, what is left of it, and three batches of eight."""
    dense = build(name)
    torch.manual_seed(0)
    graph = sc.trace(dense, TOPOLOGIES[name].inputs(2, torch.float64))
    small = sc.apply(dense, random_plan(graph, 0.3), graph=graph)
    x = [TOPOLOGIES[name].inputs(8, torch.float64)[0] for _ in range(3)]
    return dense, small, [(v, torch.arange(8) % 5) for v in x]


@pytest.mark.slow
@pytest.mark.parametrize(("every", "loader"), [(1, "plain"), (2, "plain"), (1, "prepared")])
def test_two_processes_train_on_both_shares(every: int, loader: str, tmp_path: Path) -> None:
    """Without batch norm, like one process with batches of twice the size; with it, both end alike."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(program), str(every), loader, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    found = {(n, r): torch.load(tmp_path / f"{n}{r}") for n in ("gated", "residual") for r in (0, 1)}
    for name in ("gated", "residual"):
        assert all(torch.equal(v, found[name, 1][k]) for k, v in found[name, 0].items())
    _, small, given = task("gated")
    pairs = [(given[0], given[1]), (given[2], given[0])]  # the first serves twice
    joined = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]
    wanted = literal(small, joined, 2, every, 0.05).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found["gated", 0][name], tensor, rtol=1e-10, atol=1e-10)
    _, small, _ = task("residual")
    statistics = small.norm1.running_mean
    assert not torch.equal(found["residual", 0]["norm1.running_mean"], statistics)
