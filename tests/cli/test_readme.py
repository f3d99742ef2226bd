"""What the README shows is run."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import front_page
from benchmarks.results import FOLDER as RESULTS
from secateur.cli.main import app
from tests.cli.conftest import run
from tests.cli.test_prune_checkpoint import MIXTURE
from tests.targets.experts.models import library

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def stand_in(name: str, pretrained: bool = False) -> nn.Module:
    """A small network in place of the one that timm would download."""
    assert name == "tf_efficientnet_lite0"
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()


def loaders() -> tuple[list[Any], list[Any]]:
    data = [(torch.randn(20, 1, 8, 8), torch.arange(20) % 4) for _ in range(12)]
    return data[:10], data[10:]


def test_the_python_blocks_run_one_after_another(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks("python")
    assert len(found) >= 2
    scope: dict[str, Any] = {"loaders": loaders}
    timm = types.ModuleType("timm")
    timm.create_model = stand_in  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "timm", timm)
        exec("import timm", scope)
    for block in found:
        exec(compile(block.replace("import timm\n", ""), "README.md", "exec"), scope)
    assert "of its MACs" in capsys.readouterr().out


def test_the_report_is_the_one_that_the_benchmark_printed() -> None:
    """Parts of it, in order, with three dots for what is left out."""
    (shown,) = blocks("text")
    whole, at = (RESULTS / "front_page.txt").read_text(encoding="utf-8"), 0
    for part in shown.split("\n...\n")[:-1]:
        found = whole.find(part, at)
        assert found >= 0, part
        at = found + len(part)
    assert whole.startswith(shown[:100])
    example = blocks("python")[0]
    assert f"sc.Budget(macs={front_page.MACS})" in example
    assert f"{front_page.CALIBRATION} to prune with" in example


def test_the_command_lines_run(folder: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("secateur ")]
    assert {"demo", "inspect", "prune", "tolerance"} <= {line.split()[1] for line in lines}
    if any("moe.py" in line for line in lines):
        library()
        (folder / "moe.py").write_text(MIXTURE.replace("def load", "def data"))
    for line in lines[1:]:  # the demo has a test of its own, in quick mode
        result = run(*shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, result.stderr


def test_the_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)
    assert app.info.name == "secateur"
