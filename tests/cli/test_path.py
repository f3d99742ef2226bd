"""A user's path in an empty folder: own model file, own data, and nothing but commands."""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import secateur as sc
from secateur.config.read import read_run
from secateur.config.run import Run
from tests.cli.conftest import refused, run

CODE = "from secateur.cli.main import app; app()"


def command(folder: Path, text: str) -> str:
    """The output of a command in a fresh process."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE, *shlex.split(text)], capture_output=True, text=True, cwd=folder
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_from_an_empty_folder_to_a_model_in_a_fresh_process(folder: Path) -> None:
    result = run("init", "--model", "net.py:make", "--data", "x.npz", "--macs", "0.5")
    assert result.exit_code == 0, result.stderr
    assert "secateur inspect --config secateur.yaml" in result.stdout
    found = json.loads(run("inspect", "--config", "secateur.yaml", "--json").stdout)
    assert found["units"] == 20
    text = command(folder, "prune --config secateur.yaml --set limits.min_keep=2 --out small")
    report = json.loads((folder / "small" / "report.json").read_text())
    assert report["asked"]["budget"] == {"macs": 0.5}
    assert report["figures"][1]["macs"] <= 0.5 * found["macs"]
    assert sum(layer["kept"] for layer in report["layers"]) < 20
    reload = [line.strip() for line in text.partition("reload with\n")[2].splitlines()]
    run_it = (
        "import numpy as np, torch; x = torch.from_numpy(np.load('x.npz')['x']).float()\n"
        "with torch.no_grad(): np.save('out.npy', model.eval()(x).numpy())"
    )
    code = "\n".join([*reload, run_it])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    x = torch.from_numpy(np.load(folder / "x.npz")["x"]).float()
    with torch.no_grad():
        here = sc.load(folder / "small", runpy.run_path("net.py")["make"]).eval()(x)
    assert np.array_equal(np.load(folder / "out.npy"), here.numpy())


def test_init_writes_what_the_other_commands_read(folder: Path) -> None:
    result = run("init", "--out", "run.yaml", "--data", "x.npz")
    assert result.exit_code == 0, result.stderr
    assert read_run(folder / "run.yaml") == Run(data="x.npz")
    assert "got one that exists. Give --force" in refused(2, "init", "--out", "run.yaml")
    assert run("init", "--out", "run.yaml", "--force").exit_code == 0
    assert read_run(folder / "run.yaml") == Run()
    assert "--macs half: expected a fraction or a count" in refused(
        2, "init", "--out", "other.yaml", "--macs", "half"
    )
    assert not (folder / "other.yaml").exists()
    assert "expected a file in a folder" in refused(2, "init", "--out", "none/run.yaml")
