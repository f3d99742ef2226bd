"""What docs/training.md shows is run, and the programs in examples/."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from tests.zoo.importing import import_transformers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"


def block(mentioning: str) -> str:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (only,) = (text for text in found if mentioning in text and ">>>" not in text)
    return str(only)


def test_the_examples() -> None:
    with torch.random.fork_rng():
        found = doctest.testfile(
            str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE, encoding="utf-8"
        )
    assert found.attempted > 20
    assert not found.failed


def test_the_block_of_transformers(tmp_path: Path) -> None:
    if import_transformers() is None:
        pytest.skip("transformers is not installed")
    pytest.importorskip("accelerate")
    from tests.integrations.huggingface_training import a_llama, calibration, rows

    model = a_llama()
    scope: dict[str, Any] = {
        "sc": sc,
        "model": model,
        "output": str(tmp_path),
        "arguments": {
            "max_steps": 5,
            "save_steps": 3,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "train_data": rows(24),
        "calibration": calibration(),
    }
    exec(compile(block("transformers"), str(PAGE), "exec"), scope)
    plan = sc.record_of(model).plan
    assert plan.predicted.macs <= 0.7 * plan.dense.macs


def test_the_block_of_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from tests.integrations.lightning_training import Classifier, loader
    from tests.integrations.training import batches

    module = Classifier()
    scope: dict[str, Any] = {
        "sc": sc,
        "module": module,
        "make_module": Classifier,
        "loader": loader(),
        "checkpoint": tmp_path / "last.ckpt",
        "arguments": {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "calibration": batches(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        exec(compile(block("lightning"), str(PAGE), "exec"), scope)
    assert sc.record_of(module.net).plan.settings["rounds"] == 3


def run(*command: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(output: str) -> None:
    assert re.search(r"interrupted after step \d+; going on\nround 3", output)
    found = re.search(r"(\d+)% of the MACs, accuracy ([\d.]+)%", output)
    assert found
    assert int(found[1]) <= 33
    assert float(found[2]) > 50


@pytest.mark.slow
def test_the_plain_loop() -> None:
    check(run("examples/plain_loop.py", "--steps", "60"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_loop_of_accelerate(processes: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
    program = ["examples/accelerate_loop.py", "--cpu", "--steps", "60", "--folder", str(tmp_path / "folder")]
    check(run(*start, *program))
