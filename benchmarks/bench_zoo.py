"""Every architecture of the zoo pruned and proven, at the smallest size each takes.

    python -m benchmarks.bench_zoo [name ...]

30 % of the units of every group, at least one, are removed at random. The result (form `auto`) is proven
against the masked dense model in float64, run with every axis that may vary at another size, in half
precision, and for a step in training, saved and loaded. An architecture whose groups an operator mixes
throughout is pruned inexactly, and compared with the captured program. (The slow tests of the zoo prove form
`graph` as well.) The rows of architectures that are named replace those of the last run in the result file.
"""

from __future__ import annotations

import gc
import sys
import warnings
from dataclasses import asdict

import torch
from torch import nn

import secateur as sc
from benchmarks import results
from tests.zoo.models import ZOO
from tests.zoo.walk import RATIO, walk

REALISED = 0.9
"""Share of the prunable MACs that has to be in form `module` for an architecture to count as realised."""


def main() -> None:
    """Walks the architectures named on the command line, or all."""
    warnings.simplefilter("ignore")
    sc.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(2, 3))  # imports the exporter
    found, failed, missing = [], {}, []
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
    print(f"\n{len(found)} proven, {len(failed)} failed, {len(missing)} not installed")
    print(f"{realised} have {REALISED:.0%} or more of what was removed in form module")
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    before = results.read("zoo") if sys.argv[1:] else None
    if before is not None:  # those that were named take the place of what is known of them
        known = {row["name"]: row for row in before["architectures"]} | {w.name: asdict(w) for w in found}
        fine = {w.name for w in found}
        failed = {name: why for name, why in before["failed"].items() if name not in fine} | failed
        architectures = [known[e.name] for e in ZOO if e.name in known and e.name not in failed]
        missing = [name for name in before["not_installed"] if name not in known]
        realised = sum(1 - row["needs_graph"] >= REALISED for row in architectures)
    else:
        architectures = [asdict(w) for w in found]
    content = {"ratio": RATIO, "architectures": architectures, "failed": failed}
    results.write("zoo", {**content, "not_installed": missing, "realised_as_module": realised})


if __name__ == "__main__":
    main()
