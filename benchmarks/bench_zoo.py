"""Every architecture of the zoo pruned and proven, at the smallest size each takes.

    python -m benchmarks.bench_zoo [name ...]

30 % of the units of every group, at least one, are removed at random. The result (form `auto`) is proven
against the masked dense model in float64, run with every axis that may vary at another size, in half
precision, and for a step in training, saved and loaded. An architecture whose groups an operator mixes
throughout is pruned inexactly, and compared with the captured program. (The slow tests of the zoo prove form
`graph` as well.) The rows of architectures that are named, or that were walked before Ctrl-C, replace those
of the last run in the result file.

Ends with status 1 if an architecture fails, or got worse than its row in the result file says: form `module`
before and another now, or prunable units in fewer layers. Its row then stays, and it is under ``failed``,
until it is as before. Delete the row to accept what it is now.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import results
from tests.zoo.models import ZOO
from tests.zoo.walk import RATIO, Walked, walk

REALISED = 0.9
"""Share of the prunable MACs that has to be in form `module` for an architecture to count as realised."""


def worse(found: Iterable[Walked], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What got worse since the last run, by architecture, given its rows in the result file, by name."""
    said = {}
    for now in (w for w in found if w.name in rows):
        row, changes = rows[now.name], []
        if row["form"] == "module" != now.form:
            changes.append(f"form module before, {now.form} now ({now.note})")
        if now.macs_share < row["macs_share"] - 1e-9:
            changes.append(f"coverage {row['macs_share']:.3f} before, {now.macs_share:.3f} now")
        if changes:
            said[now.name] = "; ".join(changes)
    return said


def main() -> int:
    """Walks the architectures named on the command line, or all. Returns the exit status."""
    warnings.simplefilter("ignore")
    sc.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(2, 3))  # imports the exporter
    found, failed, missing, part = [], {}, [], bool(sys.argv[1:])
    for entry in (e for e in ZOO if not sys.argv[1:] or e.name in sys.argv[1:]):
        if not entry.available():
            missing.append(entry.name)
            continue
        try:
            found.append(walk(entry, program=False))
            print(f"{entry.name}: {sum(found[-1].seconds.values()):.1f} s", file=sys.stderr)
        except Exception as error:  # whatever goes wrong with one, the others are walked
            failed[entry.name] = f"{type(error).__name__}: {error}"
            print(f"{entry.name}: {failed[entry.name]}", file=sys.stderr)
        except KeyboardInterrupt:
            part = True
            break
        gc.collect()
    rows = [
        (
            w.name, w.family, w.groups, w.units, f"{w.macs_share:.2f}", f"{w.macs:.2f}", w.form,
            f"{1 - w.needs_graph:.2f}",
            *(f"{w.seconds[s]:.2f}" for s in ("trace", "apply", "verify")),
            f"{w.proof_auto:.0e}", f"{w.elsewhere:.0e}", len(w.open), w.fixed,
            w.half, w.training, "; ".join(w.frozen),
        )
        for w in found
    ]  # fmt: skip
    headings = ("architecture", "library", "groups", "units", "coverage", "MACs", "form", "in module",
                "trace", "apply", "verify", "proof", "other sizes", "open axes",
                "fixed axes", "half", "training step", "no rule for")  # fmt: skip
    print(
        f"{int(RATIO * 100)} % of the units of every group removed; seconds; coverage = share of the MACs in "
        f"layers with prunable units; in module = share of the removed MACs that form module can remove"
    )
    print(results.table(headings, rows))
    realised = sum(1 - w.needs_graph >= REALISED for w in found)
    print(f"\n{len(found)} proven, {len(failed)} stopped, {len(missing)} not installed")
    print(f"{realised} have {REALISED:.0%} or more of what was removed in form module")
    last = results.read("zoo") or {"architectures": [], "failed": {}, "not_installed": []}
    earlier = {row["name"]: row for row in last["architectures"]}
    failed |= worse(found, earlier)
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    status = 1 if failed else 0
    if part:  # those that were walked take the place of what is known of them
        failed = {k: v for k, v in last["failed"].items() if all(k != w.name for w in found)} | failed
        missing = [name for name in last["not_installed"] if all(name != w.name for w in found)]
    else:
        earlier = {name: row for name, row in earlier.items() if name in failed}
    known = earlier | {w.name: asdict(w) for w in found if w.name not in failed}
    architectures = [known[e.name] for e in ZOO if e.name in known]
    realised = sum(1 - r["needs_graph"] >= REALISED for r in architectures if r["name"] not in failed)
    content = {"ratio": RATIO, "architectures": architectures, "failed": failed}
    results.write("zoo", {**content, "not_installed": missing, "realised_as_module": realised})
    return status


if __name__ == "__main__":
    sys.exit(main())
