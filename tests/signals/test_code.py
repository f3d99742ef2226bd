"""The digest of code tells an edit from the same code, in other processes too."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur.signals.code import code_digest

SOURCE = """
import functools
import torch
from torch import nn
SCALE = 2.0
def act(x):
    return torch.relu(x) * SCALE
def twice(f):
    @functools.wraps(f)
    def inner(*given):
        return f(*given) * 2
    return inner
class Part(nn.Module):
    heads = 4
    def __init__(self):
        super().__init__()
        self.width = 3
    @property
    def half(self):
        return 0.5
    @staticmethod
    def shift(x):
        return x + 1 if x.ndim in {2, 3} else x
    @twice
    def forward(self, x):
        return self.shift(act(x)) * self.half
def make():
    class Inner(nn.Module):
        def forward(self, x):
            return x + 1
    return nn.Sequential(nn.Linear(2, 2), Part(), Inner())
def loss(a, b, weight=1.0):
    return ((a - b) ** 2).mean() * weight
part = functools.partial(loss, weight=3.0)
"""


def made(folder: Path, source: str, name: str = "net") -> Any:
    """The module with this source, always of one name."""
    file = folder / f"{name}{abs(hash(source))}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("net", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(module: Any) -> str:
    return code_digest(module.make(), module.loss, module.part, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.relu", "torch.tanh"),
        ("SCALE = 2.0", "SCALE = 2.5"),
        ("f(*given) * 2", "f(*given) * 4"),
        ("heads = 4", "heads = 5"),
        ("width = 3", "width = 5"),
        ("return 0.5", "return 0.25"),
        ("x + 1", "x - 1"),
        ("{2, 3}", "{2, 4}"),
        ("self.half", "(1 - self.half)"),
        ("** 2", "** 4"),
        ("weight=1.0", "weight=2.0"),
        ("weight=3.0", "weight=4.0"),
        ("nn.Linear(2, 2)", "nn.Linear(2, 2, bias=False)"),
    ],
)
def test_an_edit_changes_the_digest(old: str, new: str, tmp_path: Path) -> None:
    assert old in SOURCE
    assert digest(made(tmp_path, SOURCE)) != digest(made(tmp_path, SOURCE.replace(old, new)))


def test_comments_and_modes_do_not(tmp_path: Path) -> None:
    module = made(tmp_path, SOURCE)
    edited = made(tmp_path, "# a remark\n\n" + SOURCE)
    assert digest(module) == digest(edited)
    assert code_digest(module.make) == code_digest(edited.make)
    net = module.make()
    assert code_digest(net.train()) == code_digest(net.eval())
    assert code_digest(functools.partial(module.loss, weight=3.0)) == code_digest(module.part)


def test_a_list_that_holds_itself_is_no_trouble(tmp_path: Path) -> None:
    net = made(tmp_path, SOURCE).make()
    net.around = [1]
    net.around.append(net.around)
    first = code_digest(net)
    net.around[0] = 2
    assert code_digest(net) != first


def test_it_is_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    text = "import net; from secateur.signals.code import code_digest as d; print(d(net.make(), net.loss))"
    found = {
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {text}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    assert len(found) == 1
    assert len(found.pop().strip()) == 40
