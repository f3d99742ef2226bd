"""Gradual pruning under the real Trainer of Transformers, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from secateur.integrations import GradualPruner, Schedule
from tests.zoo.importing import import_transformers

transformers = import_transformers()
if transformers is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
pytest.importorskip("accelerate")

from secateur.integrations.huggingface import GradualPruning  # noqa: E402
from tests.integrations.huggingface_training import (  # noqa: E402
    a_llama,
    a_trainer,
    calibration,
    gradual,
)


def state_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in one.state_dict().items())


@pytest.mark.slow
def test_pruned_while_training(tmp_path: Path) -> None:
    model = a_llama()
    trainer, pruner = gradual(model, tmp_path, steps=6)
    trainer.train()
    assert [done.step for done in pruner.rounds] == [2, 4]
    assert trainer.model is model
    dense = sc.record_of(model).plan.dense
    assert sc.trace(model, calibration()[0]).cost().macs <= 0.7 * dense.macs
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    moments = trainer.optimizer.state
    assert all(moments[p]["exp_avg"].shape == p.shape for p in model.parameters())
    assert all(float(moments[p]["step"]) == 6 for p in model.parameters())  # none started anew
    sc.save(model, tmp_path / "small")
    assert state_equal(sc.load(tmp_path / "small", a_llama), model)


def test_resuming_gives_what_training_in_one_go_gives(tmp_path: Path) -> None:
    """From a checkpoint between the rounds, bit for bit, through the trainer's own resume_from_checkpoint."""
    whole, _ = gradual(a_llama(), tmp_path / "whole", steps=6)
    whole.train()
    first, _ = gradual(a_llama(), tmp_path / "parts", steps=6, save=3)
    first.train()
    assert json.loads((tmp_path / "parts" / "checkpoint-3" / "pruning.json").read_text())["plan"]
    resumed, pruner = gradual(a_llama(), tmp_path / "parts", steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert [done.number for done in pruner.rounds] == [2]
    assert state_equal(resumed.model, whole.model)
    assert sc.record_of(resumed.model) == sc.record_of(whole.model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        a_trainer(a_llama(), tmp_path / "parts", steps=6).train(
            resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3")
        )


@pytest.mark.slow
def test_the_configuration_stays_true_where_layers_are_alike(tmp_path: Path) -> None:
    rule = sc.Uniform(removal="magnitude")
    trainer, _ = gradual(a_llama(2), tmp_path, steps=5, spend=False, allocator=rule)
    trainer.train()
    model = trainer.model
    widths = {layer.mlp.gate_proj.out_features for layer in model.model.layers}
    assert widths == {model.config.intermediate_size}
    assert max(widths) < a_llama(2).config.intermediate_size
    model.save_pretrained(tmp_path / "plain")
    stock = type(model).from_pretrained(tmp_path / "plain")
    assert state_equal(stock, model)


@pytest.mark.slow
def test_in_bf16_and_with_accumulation(tmp_path: Path) -> None:
    trainer, pruner = gradual(a_llama(), tmp_path, steps=5, bf16=True, gradient_accumulation_steps=2)
    trainer.train()
    assert [done.step for done in pruner.rounds] == [2, 4]
    assert trainer.state.global_step == 5


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    pruner = GradualPruner(Schedule(sc.Budget(macs=0.7), 0, 4, rounds=2), calibration(), "uniform")
    trainer = a_trainer(a_llama(), tmp_path, steps=4)
    trainer.add_callback(GradualPruning(pruner))
    with pytest.raises(sc.SettingError, match=r"expected attach\(trainer\) before train\(\)"):
        trainer.train()
    best = a_trainer(
        a_llama(),
        tmp_path,
        steps=4,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_dataset=True,
    )
    with pytest.raises(sc.SettingError, match="expected load_best_model_at_end=False, got True"):
        GradualPruning(pruner).attach(best)


_PROGRAM = """
import sys
import torch
from tests.zoo.importing import import_transformers
import_transformers()
from tests.integrations.huggingface_training import a_llama, gradual

folder, resume = sys.argv[1], sys.argv[2:]
trainer, pruner = gradual(a_llama(), folder, steps=6, save=3)
trainer.train(resume_from_checkpoint=resume[0] if resume else None)
assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
assert [done.number for done in pruner.rounds] == ([2] if resume else [1, 2])
torch.save(trainer.model.state_dict(), f"{folder}/rank{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Both end with one model, which a resumed run of both gives too."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def both(*arguments: Any) -> list[dict[str, torch.Tensor]]:
        command = [*torchrun, str(program), *map(str, arguments)]
        subprocess.run(command, env=environment, check=True, timeout=300)
        return [torch.load(Path(arguments[0]) / f"rank{rank}.pt") for rank in (0, 1)]

    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    one, other = both(tmp_path / "whole")
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    resumed, _ = both(tmp_path / "again", tmp_path / "whole" / "checkpoint-3")
    assert all(torch.equal(v, one[k]) for k, v in resumed.items())
    dense = a_llama().state_dict()
    assert any(v.shape != dense[k].shape for k, v in one.items())
