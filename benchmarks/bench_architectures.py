"""Trace, plan, apply and verify 17 architectures with random weights at 224 pixels.

    python -m benchmarks.bench_architectures [name ...]

30 % of the units of every group are removed at random, once in form `graph` and once as `auto` decides.
The proof runs in float64 on one image.
"""

from __future__ import annotations

import gc
import sys
import time

import numpy as np
from numpy.typing import NDArray

import secateur as sc
from benchmarks import results
from benchmarks.peer_torch_pruning import measured
from tests.zoo.entry import Entry
from tests.zoo.models import ENTRIES

RATIO = 0.3
TARGET = 5.0


def random_keep(graph: sc.Graph, seed: int = 0) -> dict[str, NDArray[np.bool_]]:
    """Masks that remove floor(`RATIO` x size) units of every group."""
    rng = np.random.default_rng(seed)
    masks = {}
    for group in graph.groups:
        mask = np.ones(group.size, dtype=bool)
        mask[rng.choice(group.size, int(RATIO * group.size), replace=False)] = False
        masks[group.name] = mask
    return masks


def run(entry: Entry) -> dict[str, object]:
    """Every step of one architecture, timed."""
    model = entry.make()
    (images,) = entry.inputs()
    seconds = {}

    def clock(step: str, start: float) -> None:
        seconds[step] = time.perf_counter() - start

    start = time.perf_counter()
    graph = sc.trace(model, images)
    clock("trace", start)
    start = time.perf_counter()
    plan = sc.Plan.build(graph, random_keep(graph), allocator="random", settings={"ratio": RATIO})
    clock("plan", start)
    start = time.perf_counter()
    program = sc.apply(model, plan, "graph", graph=graph, example_inputs=images)
    clock("apply", start)
    start = time.perf_counter()
    again = sc.Plan.build(graph, random_keep(graph, seed=1), allocator="random", settings={"ratio": RATIO})
    sc.apply(model, again, "graph", graph=graph, example_inputs=images)
    clock("further_plan_apply", start)
    start = time.perf_counter()
    chosen = sc.apply(model, plan, "auto", graph=graph, example_inputs=images)
    clock("apply_auto", start)
    start = time.perf_counter()
    proofs = [sc.verify(model, small, plan, images[:1]).difference for small in (program, chosen)]
    clock("verify_both", start)
    record = sc.record_of(chosen)
    rules = [f for f in graph.frozen if f.reason.startswith(("no rule", "the rule"))]
    return {
        "name": entry.name,
        "groups": len(graph.groups),
        "units": sum(g.size for g in graph.groups),
        "macs": plan.predicted.macs / plan.dense.macs,
        "params": plan.predicted.params / plan.dense.params,
        "seconds": seconds,
        "trace_plan_apply": seconds["trace"] + seconds["plan"] + seconds["apply"],
        "proof_graph": proofs[0],
        "proof_auto": proofs[1],
        "form": record.form,
        "note": record.note,
        "frozen_for_want_of_a_rule": len(rules),
        "peer": measured(entry.name, RATIO),
    }


def main() -> None:
    """Runs the architectures named on the command line, or all."""
    chosen = [e for e in ENTRIES if not sys.argv[1:] or e.name in sys.argv[1:]]
    chosen = [e for e in chosen if e.available()]
    sc.trace(chosen[0].make(), chosen[0].inputs())  # the first capture of a process also imports the exporter
    found = []
    for entry in chosen:
        found.append(run(entry))
        gc.collect()
        print(f"{entry.name}: {found[-1]['trace_plan_apply']:.1f} s", file=sys.stderr)
    rows = [
        (
            r["name"], r["groups"], r["units"], f"{r['macs']:.2f}", *(f"{r['seconds'][s]:.2f}" for s in
            ("trace", "plan", "apply", "apply_auto", "further_plan_apply")), f"{r['trace_plan_apply']:.2f}",
            f"{r['peer']['seconds']:.2f}" if "seconds" in r["peer"] else "failed", r["form"],
            f"{r['proof_graph']:.0e}", f"{r['proof_auto']:.0e}",
        )
        for r in found
    ]  # fmt: skip
    headings = ("architecture", "groups", "units", "MACs", "trace", "plan", "apply", "auto", "further", "sum",
                "peer", "form", "graph proof", "auto proof")  # fmt: skip
    print(
        f"{int(RATIO * 100)} % of the units of every group removed; seconds; "
        f"sum = trace + plan + apply (target {TARGET}); further = one more plan and apply; "
        f"peer = Torch-Pruning, same ratio, as it comes"
    )
    print(results.table(headings, rows))
    if not sys.argv[1:]:
        results.write("architectures", {"ratio": RATIO, "target_seconds": TARGET, "architectures": found})


if __name__ == "__main__":
    main()
