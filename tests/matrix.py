"""Runs the tests with other versions of torch and Python, and writes the outcome as data.

    python -m tests.matrix [--torch 2.6 2.14] [--python 3.10 3.13] [-- pytest arguments]

Each pair gets an environment of its own in `.venv-matrix`, which the next run finds again. Where a Python is
not installed, or a torch has no build for it, the row says so. Rows are added to
`benchmarks/results/matrix.json`; one of the same versions and arguments is replaced. Ends with status 1 if
tests failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
ENVIRONMENTS = ROOT / ".venv-matrix"
TORCH = ("2.6", "2.9", "2.13", "2.15")
PYTHON = ("3.10", "3.13")
FAILED = 20
"""Most names of failed tests that a row holds."""


def vision(torch: str) -> str:
    """The minor version of torchvision that belongs to a torch 2.x: their numbers differ by 15."""
    return f"0.{int(torch.split('.')[1]) + 15}.*"


def installed(python: str, torch: str) -> Path:
    """The interpreter of an environment with these versions, made if it is not there.

    Raises:
        RuntimeError: The Python is not installed, or pip cannot install torch or the development set.
    """
    folder = ENVIRONMENTS / f"python{python}-torch{torch}"
    found, done = folder / "bin" / "python", folder / ".done"
    if done.exists():
        return found
    base = shutil.which(f"python{python}")
    if base is None or subprocess.run([base, "-m", "venv", "--clear", folder], check=False).returncode:
        raise RuntimeError(f"python{python} is not installed, or makes no environments")

    def install(*what: str, needed: bool = True) -> None:
        pip = [found, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *what]
        tried = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True, check=False)
        if tried.returncode and needed:
            raise RuntimeError(f"pip install {what[-1]}: {tried.stderr.strip().splitlines()[-1][:200]}")

    install(f"torch=={torch}.*")
    install("--editable", ".[dev]", f"torch=={torch}.*")
    # What the zoo needs; a test of an architecture whose library is missing skips.
    install("--no-deps", "timm", f"torchvision=={vision(torch)}", needed=False)
    install("transformers", f"torch=={torch}.*", needed=False)
    install(
        "--no-deps", "lightning", "lightning-utilities", "pytorch-lightning", "torchmetrics", needed=False
    )
    done.touch()
    return found


def tested(python: str, torch: str, arguments: list[str]) -> dict[str, Any]:
    """One row: the versions, and what the tests came to."""
    row: dict[str, Any] = {"python": python, "torch": torch, "tests": arguments}
    try:
        interpreter = installed(python, torch)
    except RuntimeError as error:
        return row | {"outcome": str(error)}
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    version = [interpreter, "-c", "import torch; print(torch.__version__)"]
    build = subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()
    row |= {"build": build, "outcome": lines[-1].strip("= ")}
    return row | {"failed": failed[:FAILED], "status": done.returncode}


def main() -> None:
    """Runs each pair, shows and keeps its row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", nargs="+", default=TORCH)
    parser.add_argument("--python", nargs="+", default=PYTHON)
    parser.add_argument("arguments", nargs="*", help="for pytest, behind --")
    asked = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    fine = True
    for torch in asked.torch:
        for python in asked.python:
            row = tested(python, torch, asked.arguments)
            print(f"Python {python}, torch {torch}: {row['outcome']}", *row.get("failed", ()), sep="\n  ")
            keys = ("python", "torch", "tests")
            rows = [r for r in rows if any(r[k] != row[k] for k in keys)] + [row]
            RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            fine &= row.get("status", 0) == 0
    sys.exit(not fine)


if __name__ == "__main__":
    main()
