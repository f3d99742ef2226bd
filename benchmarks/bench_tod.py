"""ToD against Uniform with the same removal signal at equal MACs, with and without repair.

    python -m benchmarks.bench_tod [network ...] [--inner] [--removal SIGNAL] [--quick]

Both rules spend the budget to the last unit (the default), so they are compared within one unit of
the same MACs. With `--inner` residual streams stay as they are.
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
from benchmarks.small_networks import NAMES, network

BUDGETS = (0.8, 0.7, 0.6, 0.5)
SEEDS = (0, 1, 2, 3, 4)
INNER = {"resnet20": ("conv1", "layer2.0.conv2", "layer3.0.conv2")}
"""Per network the groups that are left alone, for inner channels only: the residual streams."""

STAGES = ("pruned", "batchnorm", "reconstruct")
"""As pruned, after batch-norm re-estimation, and after refitting every layer."""

Images = tuple[torch.Tensor, torch.Tensor]


def compare(
    name: str,
    model: nn.Module,
    images: Images,
    test: Images,
    removal: str,
    budgets: Sequence[float],
    seeds: Sequence[int],
    *,
    inner: bool = False,
) -> list[dict[str, Any]]:
    """Every seed, scope, budget and rule: cost and accuracy of the pruned and of the repaired model."""
    runs = []
    for seed in seeds:
        data = calibration(seed, *images)
        graph = sc.trace(model, data[0][0])
        scores = sc.score(graph, data, (removal, "taylor"), seed=seed, progress=False)
        scopes = {"inner": INNER[name]} if inner else {"all": ()}
        rules = (sc.ToD(removal=removal), sc.Uniform(removal=removal))
        cases = [(s, b, r) for s in scopes for b in budgets for r in rules]
        for scope, budget, rule in cases:
            run: dict[str, Any] = {
                "network": name, "seed": seed, "scope": scope, "budget": budget, "allocator": rule.name,
            }  # fmt: skip
            limits = sc.Limits(ignore=scopes[scope])
            try:
                knob = rule.allocate(graph, scores, sc.Budget(macs=budget, spend=False), limits, seed)
                plan = rule.allocate(graph, scores, sc.Budget(macs=budget), limits, seed)
            except sc.UnreachableBudgetError as error:
                runs.append({**run, "unreachable": error.smallest})
                continue
            small = sc.apply(model, plan, graph=graph, example_inputs=data[0][0])
            stages = {"pruned": small}
            for repair in STAGES[1:]:
                stages[repair] = sc.repair(small, model, data, repair, graph=graph, seed=seed, progress=False)
            exchange: Any = plan.certificates.get("exchange")
            runs.append(
                {
                    **run,
                    "settings": plan.settings,
                    "macs": plan.predicted.macs / plan.dense.macs,
                    "macs_by_the_knob_alone": knob.predicted.macs / plan.dense.macs,
                    "params": plan.predicted.params / plan.dense.params,
                    "kept": {g.name: [g.kept, g.size] for g in plan.groups},
                    **{f"top1_{stage}": top1(m.eval(), *test) for stage, m in stages.items()},
                    "repairs": [
                        r["method"] for r in sc.record_of(stages["reconstruct"]).repairs if r["kept"]
                    ],
                    "additive_loss": None if exchange is None else [exchange["loss"], exchange["other_loss"]],
                }
            )
    return runs


def summary(runs: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for each network, scope and budget: mean and standard deviation over seeds, in points."""
    rows = []
    for network_, scope, budget in dict.fromkeys((r["network"], r["scope"], r["budget"]) for r in runs):
        of_case = [r for r in runs if (r["network"], r["scope"], r["budget"]) == (network_, scope, budget)]
        found = {n: [r for r in of_case if r["allocator"] == n and "macs" in r] for n in ("tod", "uniform")}
        cells: list[Any] = [network_, scope, budget]
        if not found["tod"] or not found["uniform"]:
            rows.append((*cells, *["unreachable"] * 11))
            continue
        cells += [f"{statistics.mean(r['macs'] for r in found[n]):.4f}" for n in found]
        for stage in STAGES:
            by_rule = {n: [100 * r[f"top1_{stage}"] for r in found[n]] for n in found}
            cells += [_mean(values) for values in by_rule.values()]
            cells.append(_mean([a - b for a, b in zip(by_rule["tod"], by_rule["uniform"], strict=True)], "+"))
        rows.append(tuple(cells))
    return rows


def _mean(values: Sequence[float], sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.1f} ± {spread:.1f}"


def main() -> None:
    """Runs everything, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "networks", nargs="*", metavar="network", help=f"default resnet20; {', '.join(NAMES)}"
    )
    parser.add_argument("--inner", action="store_true", help="leave residual streams alone (resnet20)")
    parser.add_argument("--removal", default="wasserstein", help="removal signal of both rules")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two budgets, few images, no result file"
    )
    asked = parser.parse_args()
    seeds, budgets = (SEEDS[:1], BUDGETS[::3]) if asked.quick else (SEEDS, BUDGETS)
    images, test = cifar.load("train", 5000), cifar.load("test", 200 if asked.quick else None)
    print(
        f"CIFAR-10 (JPEG), top-1 in % on {len(test[1])} test images, mean ± standard deviation over "
        f"{len(seeds)} calibration seeds; removal by {asked.removal}"
    )
    headings = (
        "network", "groups", "budget", "MACs ToD", "MACs Uniform", "ToD", "Uniform", "difference",
        "ToD batchnorm", "Uniform batchnorm", "difference", "ToD reconstruct", "Uniform reconstruct",
        "difference",
    )  # fmt: skip
    for name in asked.networks or ("resnet20",):
        model = network(name)
        dense = top1(model, *test)
        runs = compare(name, model, images, test, asked.removal, budgets, seeds, inner=asked.inner)
        print(f"\n{name}, dense {100 * dense:.1f} %")
        print(results.table(headings, summary(runs)), flush=True)
        if not asked.quick:
            parts = ["tod", name]
            parts += ["inner"] * asked.inner + [asked.removal] * (asked.removal != "wasserstein")
            results.write("_".join(parts), {"dense_top1": dense, "removal": asked.removal, "runs": runs})


if __name__ == "__main__":
    main()
