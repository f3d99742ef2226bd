"""Which signal, and which semantics for coupled units: top-1 of a pruned ResNet-20 at equal MACs.

Every removal signal of the registry and some combinations, under `Uniform` and under `ToD` (protection by
`taylor`), then the ways in which the members of coupled units can be combined. After pruning, batch norms are
re-estimated; nothing is trained. Scope ``inner`` leaves the residual streams alone; ``all`` does not.

python -m benchmarks.bench_signals [--seeds N] [--images N] [--signals NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch

import secateur as sc
from benchmarks import cifar, results
from benchmarks.bench_resnet20 import calibration
from benchmarks.resnet20 import top1, trained
from secateur.errors import ConstantScoresWarning, UnreachableBudgetError
from secateur.signals.registry import SIGNALS

BUDGETS = (0.7, 0.5)
COMBINATIONS = (
    "magnitude*wasserstein",
    "magnitude+wasserstein",
    "l1*activation",
    "taylor_sample*wasserstein",
)
PROTECTION = "taylor"

SEMANTICS: dict[str, sc.signals.Signal] = {
    "magnitude, mean of members": sc.signals.Magnitude(),
    "magnitude, max of members": sc.signals.Magnitude(combine="max"),
    "magnitude, without scales": sc.signals.Magnitude(roles=("produce", "consume")),
    "magnitude, producing only": sc.signals.Magnitude(roles=("produce",)),
    "geometric_median, mean": sc.signals.GeometricMedian(),
    "geometric_median, max": sc.signals.GeometricMedian(combine="max"),
    "batchnorm_scale, mean": sc.signals.BatchNormScale(),
    "batchnorm_scale, max": sc.signals.BatchNormScale(combine="max"),
    "activation, mean": sc.signals.Activation(),
    "activation, max": sc.signals.Activation(combine="max"),
    "activation energy, mean": sc.signals.Activation(measure="energy"),
    "apoz, mean": sc.signals.APoZ(),
    "apoz, max": sc.signals.APoZ(combine="max"),
}
"""The units of one group have the same members, so the sum ranks them as the mean does."""

Table = dict[str, Mapping[str, Any]]


def streams(graph: sc.Graph) -> tuple[str, ...]:
    """The groups that several layers produce."""
    return tuple(g.name for g in graph.groups if len({site.producer for site in g.sites}) > 1)


def scored(graph: sc.Graph, data: Any, names: tuple[str, ...], semantics: bool) -> tuple[Table, Any]:
    """Scores by label, and the seconds that each signal takes alone."""
    table: Table = {}
    seconds: dict[str, float] = {}
    for name in names:
        start = time.perf_counter()
        table[name] = sc.score(graph, data, name, progress=False)[name]
        seconds[name] = time.perf_counter() - start
    for label, signal in SEMANTICS.items() if semantics else ():
        table[label] = sc.score(graph, data, signal, progress=False)[signal.name]
    if PROTECTION not in table:
        table[PROTECTION] = sc.score(graph, data, PROTECTION, progress=False)[PROTECTION]
    return table, seconds


def measured(
    model: torch.nn.Module, graph: sc.Graph, data: Any, plan: sc.Plan, test: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    """Cost and top-1 of a plan."""
    small = sc.apply(model, plan, "graph", graph=graph)
    repaired = sc.repair(small, model, data, "batchnorm", progress=False)
    return {"macs": plan.predicted.macs / plan.dense.macs, "top1": top1(repaired, *test)}


def main() -> None:
    """Runs everything, prints the tables and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=3000, help="test images")
    parser.add_argument("--signals", nargs="*", default=[*SIGNALS, *COMBINATIONS])
    parser.add_argument("--no-semantics", action="store_true")
    asked = parser.parse_args()
    model = trained()
    images, labels = cifar.load("train", 5000)
    test = cifar.load("test", asked.images)
    dense = top1(model, *test)
    warnings.simplefilter("ignore", ConstantScoresWarning)  # a signal may say nothing about some group
    runs: list[dict[str, Any]] = []
    seconds: dict[str, list[float]] = {}
    for seed in range(asked.seeds):
        data = calibration(seed, images, labels)
        graph = sc.trace(model, data[0][0])
        scopes = {"inner": streams(graph), "all": ()}
        table, took = scored(graph, data, tuple(asked.signals), not asked.no_semantics)
        for name, value in took.items():
            seconds.setdefault(name, []).append(value)
        for label in [*asked.signals, *([] if asked.no_semantics else SEMANTICS)]:
            for scope, ignored in scopes.items():
                if label in SEMANTICS and scope == "inner":
                    continue  # an inner unit has one producing layer
                for rule in (sc.Uniform(removal=label), sc.ToD(removal=label, protection=PROTECTION)):
                    for budget in BUDGETS:
                        asked_for = sc.Budget(macs=budget), sc.Limits(ignore=ignored)
                        try:
                            plan = rule.allocate(graph, table, *asked_for)
                            found = measured(model, graph, data, plan, test)
                        except UnreachableBudgetError as error:
                            found = {"refused": str(error)}
                        of = {"seed": seed, "signal": label, "scope": scope}
                        runs.append({**of, "rule": rule.name, "budget": budget, **found})
        print(f"seed {seed} done", flush=True)
    report(runs, seconds, dense, len(test[1]))
    results.write(
        "signals",
        {"dense_top1": dense, "test_images": len(test[1]), "seconds_alone": seconds, "runs": runs},
    )


def report(
    runs: list[dict[str, Any]], seconds: dict[str, list[float]], dense: float, test_images: int
) -> None:
    """Prints one table a scope: mean top-1 over the seeds, and the spread."""
    seeds = len({run["seed"] for run in runs})
    print(
        f"ResNet-20, CIFAR-10 (JPEG), top-1 on {test_images} test images, dense {dense:.3f}, after "
        f"batch-norm re-estimation;\nmean ± standard deviation over {seeds} calibration seeds"
    )
    columns = [(rule, budget) for budget in BUDGETS for rule in ("uniform", "tod")]
    for scope in ("inner", "all"):
        labels = dict.fromkeys(r["signal"] for r in runs if r["scope"] == scope)
        rows = []
        for label in labels:
            cells = [_cell(runs, label, scope, rule, budget) for rule, budget in columns]
            alone = seconds.get(label)
            rows.append((label, *cells, f"{statistics.median(alone):.2f}" if alone else ""))
        print(f"\nscope {scope}")
        print(results.table(("signal", *(f"{r} {b}" for r, b in columns), "seconds"), rows))


def _cell(runs: list[dict[str, Any]], label: str, scope: str, rule: str, budget: float) -> str:
    wanted = (label, scope, rule, budget)
    of = [r for r in runs if (r["signal"], r["scope"], r["rule"], r["budget"]) == wanted]
    found = [r["top1"] for r in of if "top1" in r]
    if len(found) < len(of):
        return "refused"
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    main()
