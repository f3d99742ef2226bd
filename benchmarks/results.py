"""Where result files go, and how tables look."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

FOLDER = Path(__file__).parent / "results"


def write(name: str, content: Mapping[str, Any]) -> Path:
    """Writes `content` and the environment to ``results/<name>.json``."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    print(f"\nwritten to benchmarks/results/{path.name}")
    return path


def read(name: str) -> dict[str, Any] | None:
    """What ``results/<name>.json`` holds; None if there is none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under headings, in aligned columns; numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(t[k]) for t in [list(headings), *texts]) for k in range(len(headings))]
    lines = ["  ".join(h.ljust(w) for h, w in zip(headings, widths, strict=True)).rstrip()]
    lines.append("  ".join("-" * w for w in widths))
    for row, text in zip(rows, texts, strict=True):
        cells = (
            t.rjust(w) if isinstance(c, int | float) or t[:1].isdigit() else t.ljust(w)
            for c, t, w in zip(row, text, widths, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
