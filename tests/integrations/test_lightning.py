"""Gradual pruning under the real Trainer of Lightning, on the CPU."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.integrations import GradualPruner, Schedule
from tests.integrations.training import a_pruner, batches, macs, network

pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings(  # Lightning's advice on loaders, and what it uses of torch
    "ignore:.*does not have many workers",
    "ignore:.*have no `val_dataloader`",
    "ignore:.*LeafSpec:FutureWarning",
)

from secateur.integrations.lightning import GradualPruning, reshaped  # noqa: E402
from tests.integrations.lightning_training import Classifier, Steps, a_trainer, fit, loader  # noqa: E402


def state_equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in one.state_dict().items())


def test_pruned_while_training(tmp_path: Path) -> None:
    module, pruner = Classifier(), a_pruner(rounds=2, end=4)
    trainer = fit(module, pruner, tmp_path, steps=7)
    assert [done.step for done in pruner.rounds] == [2, 4]
    assert macs(module.net) <= macs(network()) / 2
    (optimizer,) = trainer.optimizers
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in module.parameters())
    assert all(float(optimizer.state[p]["step"]) == 7 for p in module.parameters())
    sc.save(module.net, tmp_path / "small")
    assert state_equal(sc.load(tmp_path / "small", network), module.net)


def test_resuming_gives_what_training_in_one_go_gives(tmp_path: Path) -> None:
    """From a checkpoint between the rounds, bit for bit, through fit(ckpt_path=...).

    With all data in one batch: the trainer itself starts an epoch that was cut anew.
    """
    whole = Classifier()
    fit(whole, a_pruner(rounds=2, end=4), tmp_path, steps=7, batch_size=96)
    part = Classifier()
    cut = fit(part, a_pruner(rounds=2, end=4), tmp_path, steps=3, batch_size=96)
    cut.save_checkpoint(tmp_path / "part.ckpt")
    resumed, pruner = Classifier(), a_pruner(rounds=2, end=4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        a_trainer(tmp_path, steps=7).fit(resumed, loader(), ckpt_path=tmp_path / "part.ckpt")
    fit(resumed, pruner, tmp_path, steps=7, batch_size=96, ckpt_path=tmp_path / "part.ckpt")
    assert [done.number for done in pruner.rounds] == [2]
    assert state_equal(resumed, whole)
    assert sc.record_of(resumed.net) == sc.record_of(whole.net)


def test_without_fitting(tmp_path: Path) -> None:
    """A checkpoint, of tensors alone too, is validated by a trainer and loaded without one."""
    module = Classifier()
    trainer = fit(module, a_pruner(rounds=2, end=4), tmp_path, steps=5)
    trainer.save_checkpoint(tmp_path / "slim.ckpt", weights_only=True)
    fresh = Classifier()
    callback = GradualPruning(a_pruner(rounds=2, end=4), part="net")
    a_trainer(tmp_path, steps=1, callbacks=[callback]).validate(
        fresh, loader(), ckpt_path=tmp_path / "slim.ckpt", verbose=False
    )
    assert state_equal(fresh, module)
    assert state_equal(pickle.loads(pickle.dumps(fresh.net)), module.net)
    assert state_equal(copy.deepcopy(module), module)
    checkpoint = torch.load(tmp_path / "slim.ckpt", weights_only=True)
    assert state_equal(reshaped(Classifier(), checkpoint, part="net"), module)
    with pytest.raises(sc.ArtefactError, match="expected a checkpoint of Lightning, got entries"):
        reshaped(Classifier(), {"model": 1})


def test_the_module_as_a_whole_with_shares_and_accumulation(tmp_path: Path) -> None:
    module = Classifier()
    schedule = Schedule(sc.Budget(macs=0.5), start=0.0, end=0.5, rounds=2)
    pruner = GradualPruner(schedule, batches(), "uniform")
    fit(module, pruner, tmp_path, steps=8, part="", accumulate_grad_batches=2)
    assert [done.step for done in pruner.rounds] == [2, 4]
    assert module.trainer is not None
    assert sc.record_of(module).plan.settings["rounds"] == 2
    sc.save(module, tmp_path / "small")
    assert state_equal(sc.load(tmp_path / "small", Classifier), module)


def test_in_bf16(tmp_path: Path) -> None:
    pruner = a_pruner(rounds=1, end=2)
    fit(Classifier(), pruner, tmp_path, steps=4, precision="bf16-mixed")
    assert len(pruner.rounds) == 1


def test_pytorch_lightning_takes_it_too(tmp_path: Path) -> None:
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(Steps, pytorch_lightning.LightningModule):  # type: ignore[name-defined, misc]
        pass

    pruner = a_pruner(rounds=2, end=4)
    fit(Other(), pruner, tmp_path, steps=5, library=pytorch_lightning)
    assert len(pruner.rounds) == 2


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sc.SettingError, match="path of a submodule, got 'network'"):
        fit(Classifier(), a_pruner(), tmp_path, steps=1, part="network")

    class FSDPStrategy:
        pass

    class Sharded:
        strategy = FSDPStrategy()

    callback: Any = GradualPruning(a_pruner(), part="net")
    with pytest.raises(sc.SettingError, match="the whole model in each process, got FSDPStrategy"):
        callback.setup(Sharded(), Classifier(), "fit")


_PROGRAM = """
import sys
import torch
from tests.integrations.lightning_training import Classifier, fit
from tests.integrations.training import a_pruner

folder, resume = sys.argv[1], sys.argv[2:]
module, pruner = Classifier(), a_pruner(rounds=2, end=4)
settings = dict(devices=2, strategy="ddp", ckpt_path=resume[0] if resume else None)
trainer = fit(module, pruner, folder, steps=6 if resume else 3, **settings)
assert trainer.world_size == 2
assert [done.number for done in pruner.rounds] == ([2] if resume else [1])
trainer.save_checkpoint(f"{folder}/last.ckpt")
torch.save(module.state_dict(), f"{folder}/rank{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Pruned after step 2, resumed after 3, pruned after 4: both processes end with one model."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for arguments in ([tmp_path], [tmp_path, tmp_path / "last.ckpt"]):
        command = [*torchrun, str(program), *map(str, arguments)]
        subprocess.run(command, env=environment, check=True, timeout=300)
        one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
        for name, tensor in one.items():
            if "running" not in name:  # each counts these on its own share until the next round
                assert torch.equal(tensor, other[name]), name
    dense = Classifier().state_dict()
    assert any(v.shape != dense[k].shape for k, v in one.items())
