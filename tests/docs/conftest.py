from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.graph.rules import RULES


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; modules imported from it and rules added meanwhile are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    modules, rules = set(sys.modules), dict(RULES)
    yield tmp_path
    RULES.clear()
    RULES.update(rules)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
