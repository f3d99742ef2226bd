"""Walks the cases, one process each, and writes what was found as data and as a page (docs/libraries.md).

    python -m tests.libraries.run [NAME ...]

A case whose library is not installed is skipped and keeps what was found before. Ends with status 1 if a case
crashed, computed something wrong, or was refused what it could do before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.libraries.case import Case
from tests.libraries.importing import missing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "libraries.json"
SECONDS = 600
"""After which a case counts as hung."""


def walked(case: Case) -> dict[str, Any]:
    """What `tests.libraries.walk` finds about one case, in a process of its own."""
    command = [sys.executable, "-m", "tests.libraries.walk", case.name]
    failed = {
        "name": case.name,
        "library": case.library,
        "form": "refused",
        "note": "",
        "groups": 0,
        "macs": 1.0,
    }
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return failed | {"checks": {"prune": f"crash: not done after {SECONDS} s"}}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return failed | {"checks": {"prune": f"crash: {last[:300]}"}}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def faults(found: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Checks that crashed or computed something wrong, or are refused though they passed before."""
    known = before.get("checks", {})
    return [
        f"{title}: {what}"
        for title, what in found["checks"].items()
        if what.startswith(("WRONG", "crash")) or (what.startswith("refused") and known.get(title) == "ok")
    ]


def read() -> dict[str, dict[str, Any]]:
    """What was found last, by name."""
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": []}
    return {found["name"]: found for found in held["cases"]}


def write(found: dict[str, dict[str, Any]], order: list[str]) -> None:
    """Writes the cases that still exist, in their order."""
    cases = [found[name] for name in order if name in found]
    RESULTS.write_text(
        json.dumps({"workload": "python -m tests.libraries.run", "cases": cases}, indent=1) + "\n"
    )


def main(names: list[str]) -> int:
    """Walks the named cases, or all."""
    from tests.libraries.cases import CASES
    from tests.libraries.page import PAGE, page

    passed = failed = skipped = 0
    held = read()
    for case in CASES:
        if names and case.name not in names:
            continue
        if reason := missing(case.library):
            skipped += 1
            print(f"{case.name}: skipped, {reason}", flush=True)
            continue
        before, held[case.name] = held.get(case.name, {}), walked(case)
        wrong = faults(held[case.name], before)
        failed, passed = failed + bool(wrong), passed + (not wrong)
        print(f"{case.name}: {held[case.name]['form']}", *wrong, sep="\n    ", flush=True)
        write(held, [c.name for c in CASES])
    PAGE.write_text(page(list(read().values())))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
