"""Does one fixed tolerance serve? Cost and accuracy over tolerances, for networks of several shapes.

    python -m benchmarks.bench_tolerance [network ...] [--quick]

Without names, every network that has weights: `python -m benchmarks.small_networks` trains the small ones.
Repair is by refitting every layer (``reconstruct``). Each network has a result file of its own; the answer at
the end is from all that there are.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.bench_resnet20 import calibration
from benchmarks.resnet20 import top1
from benchmarks.small_networks import NAMES, network, weights_of

TOLERANCES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
SEEDS = (0, 1, 2)
LOSSES = (1.0, 2.0, 5.0)
"""Points of accuracy that a user may be ready to give."""

Images = tuple[torch.Tensor, torch.Tensor]


def ablate(
    name: str,
    model: nn.Module,
    images: Images,
    test: Images,
    tolerances: Sequence[float],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Every seed and tolerance: cost, what layers keep, and accuracy of the pruned and the repaired model."""
    runs = []
    for seed in seeds:
        data = calibration(seed, *images)
        graph = sc.trace(model, data[0][0])
        scores = sc.score(graph, data, sc.ToD().signals, seed=seed, progress=False)
        for tolerance in tolerances:
            plan = sc.ToD(tolerance).allocate(graph, scores, seed=seed)
            small = sc.apply(model, plan, graph=graph, example_inputs=data[0][0])
            repaired = sc.repair(small, model, data, "reconstruct", graph=graph, seed=seed, progress=False)
            runs.append(
                {
                    "network": name,
                    "seed": seed,
                    "tolerance": tolerance,
                    "macs": plan.predicted.macs / plan.dense.macs,
                    "params": plan.predicted.params / plan.dense.params,
                    "kept": {g.name: [g.kept, g.size] for g in plan.groups},
                    "top1_pruned": top1(small.eval(), *test),
                    "top1_repaired": top1(repaired.eval(), *test),
                }
            )
    return runs


def summary(runs: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for each network and tolerance: means over seeds."""
    rows = []
    for name, tolerance in dict.fromkeys((r["network"], r["tolerance"]) for r in runs):
        found = [r for r in runs if (r["network"], r["tolerance"]) == (name, tolerance)]
        shares = [kept / size for r in found for kept, size in r["kept"].values()]
        means = [
            statistics.mean(r[key] for r in found)
            for key in ("macs", "params", "top1_pruned", "top1_repaired")
        ]
        rows.append(
            (
                name,
                f"{tolerance:.2f}",
                *(f"{100 * m:.1f}" for m in means),
                f"{min(shares):.2f}–{max(shares):.2f}",
            )
        )
    return rows


def answers(runs: Sequence[dict[str, Any]], dense: dict[str, float]) -> list[tuple[Any, ...]]:
    """Per network, for each loss in `LOSSES`, the largest tolerance up to which repair stays within it.

    One fixed tolerance serves where a column holds one value for all networks.
    """
    rows: list[tuple[Any, ...]] = []
    for name, before in dense.items():
        cells = []
        for points in LOSSES:
            within = None
            for tolerance in sorted({r["tolerance"] for r in runs if r["network"] == name}):
                found = [r for r in runs if (r["network"], r["tolerance"]) == (name, tolerance)]
                if 100 * (before - statistics.mean(r["top1_repaired"] for r in found)) > points:
                    break
                within = tolerance, statistics.mean(r["macs"] for r in found)
            cells.append("none" if within is None else f"{within[0]:.2f} ({100 * within[1]:.0f} % of MACs)")
        rows.append((name, f"{100 * before:.1f}", *cells))
    return rows


def main() -> None:
    """Runs everything, prints the tables and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="network", help=", ".join(NAMES))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="calibration seeds")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, few tolerances and images, no result file"
    )
    asked = parser.parse_args()
    ready = [n for n in NAMES if n == "resnet20" or weights_of(n).is_file()]
    seeds, tolerances = (SEEDS[:1], TOLERANCES[::5]) if asked.quick else (range(asked.seeds), TOLERANCES)
    images, test = cifar.load("train", 5000), cifar.load("test", 200 if asked.quick else None)
    print(
        f"CIFAR-10 (JPEG), % of dense cost, top-1 in % on {len(test[1])} test images, "
        f"means over {len(seeds)} calibration seeds"
    )
    headings = ("network", "tolerance", "MACs", "params", "pruned", "repaired", "kept in a layer")
    found: dict[str, Any] = {}
    for name in asked.networks or ready:
        model = network(name)
        runs = ablate(name, model, images, test, tolerances, seeds)
        found[name] = {"dense_top1": top1(model, *test), "runs": runs}
        print(results.table(headings, summary(runs)), flush=True)
        if not asked.quick:
            results.write(f"tolerance_{name}", found[name])
    if not asked.quick:
        found = {n: kept for n in NAMES if (kept := results.read(f"tolerance_{n}")) is not None}
    print("\nlargest tolerance up to which the repaired model loses at most so many points of accuracy")
    every = [run for each in found.values() for run in each["runs"]]
    answered = answers(every, {name: each["dense_top1"] for name, each in found.items()})
    print(results.table(("network", "dense", *(f"{points:g} points" for points in LOSSES)), answered))


if __name__ == "__main__":
    main()
