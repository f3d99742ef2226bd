"""The recipes of docs/recipes.md run, as far as their libraries are installed; see `make test-libraries`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.libraries.recipes import RECIPES, run


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    run(name)


def test_each_library_has_one() -> None:
    assert set(RECIPES) == {"timm", "ultralytics", "diffusers", "sentence_transformers", "peft"}
