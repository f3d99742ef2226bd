"""The page of the documentation that says which models of other libraries can be pruned, and used afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "libraries.md"


def page(cases: list[dict[str, Any]]) -> str:
    """The page."""
    return f"{len(cases)}\n"
