"""Equal fine-tuning from repaired and from unrepaired starts: ResNet-20 on CIFAR-10, ToD and Uniform.

    python -m benchmarks.bench_recover [--quick]

Every start is fine-tuned by `sc.recover` alike: the same images in the same order, the dense model as
teacher, the default optimiser and rate. Plans, calibration images and repair are those of `bench_tod`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from benchmarks import cifar, results
from benchmarks.bench_resnet20 import calibration
from benchmarks.bench_tod import Images
from benchmarks.resnet20 import top1, trained

BUDGETS = (0.58,)
SEEDS = (0,)
EPOCHS, IMAGES, BATCH = 2, 20_000, 128
POOL = 5000
"""Training images that calibration images are drawn from."""

STARTS = ("pruned", "reconstruct")
"""As pruned, and after refitting every layer."""


def compare(
    model: nn.Module, train: Images, test: Images, budgets: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Top-1 before and after fine-tuning, for every seed, budget, rule and start."""
    runs = []
    loader = DataLoader(TensorDataset(*train), BATCH, shuffle=True, drop_last=True)
    for seed in seeds:
        data = calibration(seed, *(part[:POOL] for part in train))
        graph = sc.trace(model, data[0][0])
        scores = sc.score(graph, data, ("wasserstein", "taylor"), seed=seed, progress=False)
        cases = [(b, rule) for b in budgets for rule in (sc.ToD(), sc.Uniform(removal="wasserstein"))]
        for budget, rule in cases:
            plan = rule.allocate(graph, scores, sc.Budget(macs=budget), seed=seed)
            small = sc.apply(model, plan, graph=graph, example_inputs=data[0][0])
            for start in STARTS:
                if start != "pruned":
                    small = sc.repair(small, model, data, start, graph=graph, seed=seed, progress=False)
                begun = time.perf_counter()
                tuned = sc.recover(small, model, loader, epochs=EPOCHS, seed=seed, progress=False)
                seconds = time.perf_counter() - begun
                runs.append(
                    {
                        "seed": seed, "budget": budget, "allocator": rule.name, "start": start,
                        "macs": plan.predicted.macs / plan.dense.macs,
                        "params": plan.predicted.params / plan.dense.params,
                        "kept": {g.name: [g.kept, g.size] for g in plan.groups},
                        "before": top1(small.eval(), *test), "after": top1(tuned.eval(), *test),
                        "seconds": seconds,
                    }
                )  # fmt: skip
                print({k: v for k, v in runs[-1].items() if k != "kept"}, file=sys.stderr, flush=True)
    return runs


def summary(runs: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for each budget, rule and start: means over seeds, top-1 in %."""
    rows = []
    for case in dict.fromkeys((r["budget"], r["allocator"], r["start"]) for r in runs):
        mine = [r for r in runs if (r["budget"], r["allocator"], r["start"]) == case]
        macs = statistics.mean(r["macs"] for r in mine)
        means = (f"{100 * statistics.mean(r[k] for r in mine):.1f}" for k in ("before", "after"))
        rows.append((*case, f"{macs:.4f}", *means))
    return rows


def main() -> None:
    """Runs everything, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one budget, few images, no result file")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    model = trained()
    train = cifar.load("train", POOL if asked.quick else IMAGES)
    test = cifar.load("test", 500 if asked.quick else None)
    dense = top1(model, *test)
    runs = compare(model, train, test, BUDGETS, SEEDS)
    print(
        f"ResNet-20, CIFAR-10, dense {100 * dense:.1f} %; {EPOCHS} epochs over {len(train[1])} images, "
        f"top-1 in % on {len(test[1])} test images, mean of {len(SEEDS)} seed(s)"
    )
    print(results.table(("budget", "rule", "start", "MACs", "before", "after"), summary(runs)))
    if not asked.quick:
        settings = {"epochs": EPOCHS, "images": len(train[1]), "batch": BATCH}
        results.write("recover", {"dense_top1": dense, **settings, "runs": runs})


if __name__ == "__main__":
    main()
