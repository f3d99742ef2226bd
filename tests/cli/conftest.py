from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from secateur.cli.main import app

NET = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    print("made a model")  # users' code prints; stdout stays clean all the same
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    ).eval()


def load():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 3, 6, 6, generator=generator), torch.arange(12) % 3) for _ in range(6)]


class Make:
    model = staticmethod(make)


def wrong():
    return {"not": "a model"}


def fails():
    raise ValueError("no weights here")


def single():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()


instance = nn.Linear(2, 2)
"""


@pytest.fixture(autouse=True)
def ctrl_c_answers() -> Iterator[None]:
    """A shell has jobs in the background ignore Ctrl-C, and these tests with them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder with a user's files in it; what they import is forgotten afterwards."""
    (tmp_path / "net.py").write_text(NET)
    generator = np.random.default_rng(2)
    labels = np.arange(72) % 3
    images = generator.standard_normal((72, 3, 6, 6)) + labels[:, None, None, None]
    np.savez(tmp_path / "x.npz", x=images, y=labels.astype(np.int32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / "net.py"):
            del sys.modules[name]


def run(*arguments: str) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, list(arguments))


def refused(code: int, *arguments: str) -> str:
    """The one line on stderr of a command that has to end with `code`."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if line != "made a model"]
    assert len(said) == 1, said
    assert "Traceback" not in said[0]
    assert said[0].startswith("secateur: ")
    return said[0]
