"""The examples on the pages of docs/ run, and give what they say."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["effective_size.md", "experts.md"])
def test_examples(page: str) -> None:
    with torch.random.fork_rng():
        found = doctest.testfile(
            str(PAGES / page),
            module_relative=False,
            optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
            encoding="utf-8",
        )
    assert found.attempted > 10
    assert not found.failed
