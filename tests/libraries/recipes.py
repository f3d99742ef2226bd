"""Runs what docs/recipes.md shows, each recipe in a folder of its own.

    python -m tests.libraries.recipes

A recipe whose library is not installed is skipped. Ends with status 1 if one fails.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
import types
from importlib.util import find_spec
from pathlib import Path

from tests.libraries.importing import prepare

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
RECIPES = dict(re.findall(r"<!-- needs: (\w+) -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
"""The code of each recipe, by the package that it needs."""


def run(name: str) -> None:
    """Run a recipe as a module of its own."""
    module = types.ModuleType(f"recipe_{name}")
    sys.modules[module.__name__] = module
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(RECIPES[name], f"{PAGE.name}: {name}", "exec"), vars(module))
        finally:
            os.chdir(before)


def main() -> int:
    """Run all recipes, and return the exit status."""
    prepare()
    failed = 0
    for name in RECIPES:
        if find_spec(name) is None:
            print(f"{name}: skipped, not installed")
            continue
        try:
            run(name)
        except Exception:
            failed += 1
            traceback.print_exc()
        print(f"{name}: done", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
