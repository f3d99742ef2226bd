"""What the README shows is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from secateur.cli.main import app
from tests.cli.conftest import run
from tests.cli.test_prune_checkpoint import MIXTURE
from tests.targets.experts.models import library

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_one_after_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks("python")
    assert len(found) >= 2
    scope: dict[str, Any] = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), scope)
    assert "of its MACs" in capsys.readouterr().out


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
