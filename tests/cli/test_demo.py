from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.cli.shell import python_command
from secateur.demo.digits import load_digits
from secateur.demo.train import one_thread, train
from tests.cli.conftest import refused, run


def test_it_runs_end_to_end_and_what_it_prints_loads_the_model(folder: Path) -> None:
    result = run("demo", "--quick", "--seed", "1")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""  # no bars in a pipe
    report = json.loads((folder / "demo" / "report.json").read_text())
    dense, pruned = report["figures"][:2]
    assert dense["accuracy"] > 0.9
    assert pruned["macs"] <= 0.5 * dense["macs"]
    assert report["judged_on"] == "evaluation data"
    assert report["proof"]["difference"] <= 1e-9
    assert f"{100 * dense['accuracy']:.2f} %" in result.stdout
    assert "stage3.1.conv1" in result.stdout
    command = result.stdout.splitlines()[-1].strip()
    assert "-c" in command
    loaded = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder)
    assert loaded.returncode == 0, loaded.stderr
    kept = {layer["group"]: layer["kept"] for layer in report["layers"]}
    assert f"(stem): Conv2d(1, {kept['stem']}, " in loaded.stdout


def test_the_split_is_fixed_disjoint_and_normalised() -> None:
    first, again = load_digits(), load_digits()
    assert torch.equal(first.images, again.images)
    assert [len(part) for part in (first.labels, first.calibration, first.test)] == [1077, 6, 6]
    assert abs(float(first.images.mean())) < 1e-5
    assert abs(float(first.images.std()) - 1) < 1e-5
    parts = [first.images, *(images for part in (first.calibration, first.test) for images, _ in part)]
    assert sum(map(len, parts)) == 1797
    # The data holds no image twice, so the parts share none.
    assert len(torch.unique(torch.cat(parts).flatten(1), dim=0)) == 1797


def test_training_is_deterministic_and_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_digits()
    before = torch.get_rng_state()
    nets = [
        train(digits.images[:128], digits.labels[:128], epochs=1, seed=seed, progress=False).state_dict()
        for seed in (4, 4, 5)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].values(), nets[1].values(), strict=True))
    assert not torch.equal(nets[0]["stem.weight"], nets[2]["stem.weight"])


def test_one_thread_is_given_back_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_without_scikit_learn_the_error_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert 'pip install "secateur[demo]"' in refused(2, "demo")


@pytest.mark.parametrize("out", ["plain", "with space", "quote'd", 'double"d', "$HOME", "`id`", "a\\b"])
def test_the_command_survives_the_shell(folder: Path, out: str) -> None:
    command = python_command(f"print({out!r})")
    assert shlex.split(command)[1:] == ["-c", f"print({out!r})"]
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert ran.stdout == f"{out}\n"
