"""Models that Accelerate has spread over memory and disk lose units as they do in memory."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.common import mapped
from secateur.common.mapped import any_mapped
from secateur.errors import SettingError
from secateur.targets.units.spread import gathered
from tests.stream.test_mapped import Decoder

accelerate = pytest.importorskip("accelerate")


def spread(model: nn.Module, how: str, folder: Path) -> nn.Module:
    """The same model, on disk in part, or offloaded to the CPU."""
    model = copy.deepcopy(model)
    if how == "offloaded":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))  # type: ignore[no-any-return]
    names = ("embed", "blocks.0", "blocks.1", "blocks.2", "head")
    places = dict(zip(names, ("cpu", "cpu", "disk", "disk", "disk"), strict=True))
    return accelerate.dispatch_model(  # type: ignore[no-any-return]
        model, device_map=places, offload_dir=folder, main_device="cpu"
    )


def dense() -> nn.Module:
    torch.manual_seed(0)
    return Decoder().eval()


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(17, (4, 6), generator=generator) for _ in range(14)]


def steps(model: nn.Module, folder: Path) -> dict[str, Any]:
    graph = sc.trace(model, data()[0])
    scores = sc.score(graph, data(), ("reconstruction", "activation"), progress=False)
    plan = sc.RepairAware().allocate(graph, scores, sc.Budget(params=0.7))
    small = sc.apply(model, plan, graph=graph)
    assert sc.verify(model, small, plan, data()[0]).proven
    fixed = sc.repair(small, model, data(), "reconstruct", graph=graph, progress=False)
    sc.save(fixed, folder)
    return {"scores": scores, "plan": plan.to_json(), "state": sc.load(folder, dense).state_dict()}


@pytest.mark.filterwarnings("ignore")  # Accelerate warns of tied weights
@pytest.mark.parametrize("how", ["offloaded", "on disk"])
def test_every_step_gives_what_it_gives_in_memory(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SMALL", 0)
    model = dense()
    there = spread(model, how, tmp_path)
    wanted = there(data()[0])
    expected, found = steps(model, tmp_path / "a"), steps(there, tmp_path / "b")
    assert found["plan"] == expected["plan"]
    for signal, by_group in expected["scores"].values.items():
        for group, vector in by_group.items():
            np.testing.assert_allclose(found["scores"][signal][group], vector, rtol=1e-12)
    for name, tensor in expected["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(there(data()[0]), wanted)
    assert any(p.is_meta for p in there.parameters())  # as it was
    plain = gathered(there)
    assert any_mapped(plain.parameters()) == (how == "on disk")
    assert plain.head.weight is plain.embed.weight
    assert torch.equal(plain(data()[0]), wanted)
    assert not any(hasattr(module, "_hf_hook") for module in plain.modules())


@pytest.mark.filterwarnings("ignore")
def test_prune_and_compare_take_such_a_model(tmp_path: Path) -> None:
    options: dict[str, Any] = {"repair": "bias", "progress": False}
    results = [
        sc.prune(m, data(), sc.Budget(params=0.8), "repair_aware", measure_latency=False, **options)
        for m in (dense(), spread(dense(), "on disk", tmp_path))
    ]
    assert results[0].plan.to_json() == results[1].plan.to_json()
    assert results[1].report.figures[0].loss == pytest.approx(results[0].report.figures[0].loss)
    there = spread(dense(), "offloaded", tmp_path)
    found = sc.compare(there, data(), ["uniform"], [sc.Budget(params=0.8)], repair=None, progress=False)
    assert len(found.outcomes) == 1


def test_a_model_without_hooks_is_itself() -> None:
    model = dense()
    assert gathered(model) is model


def test_a_tensor_without_values_is_refused(tmp_path: Path) -> None:
    there = spread(dense(), "on disk", tmp_path)
    there.other = nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(SettingError, match="expected a other with values"):
        sc.trace(there, data()[0])


SHARDED = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
import secateur as sc
from tests.targets.units.test_spread import data, dense
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
model = dense()
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
try:
    sc.trace(model, data()[0])
except sc.SettingError as error:
    assert "which FSDP shards" in str(error) and "get_model_state_dict" in str(error), error
else:
    raise SystemExit("not refused")
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
plain = dense()
with torch.no_grad():
    for parameter in plain.parameters():
        parameter.zero_()
plain.load_state_dict(state)
options = dict(repair="bias", measure_latency=False, progress=False)
print(sc.prune(plain, data(), sc.Budget(params=0.8), "repair_aware", **options).plan.to_json())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_model_is_refused_and_what_is_advised_works(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "store")]
    root = Path(__file__).parents[3]
    pipe = subprocess.PIPE
    options: dict[str, Any] = {"stdout": pipe, "stderr": pipe, "text": True, "cwd": root}
    both = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] != ""
