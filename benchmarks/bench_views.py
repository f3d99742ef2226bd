"""What views bring: accuracy after pruning and repair, against the number of pictures and of views of each.

    python -m benchmarks.bench_views [resnet20] [efficientnet]

Each picture serves as it is and as crops and mirror images of itself (`sc.Views`), for the scores that the
repair-aware rule decides by and for the repair `reconstruct`. No labels are read. ResNet-20 is judged on
3,000 test images, EfficientNet-Lite0 on the 250 pictures that none is calibrated with.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks import cifar, imagenet, results
from benchmarks.resnet20 import top1, trained

CASES: dict[str, dict[str, Any]] = {
    "resnet20": {"macs": 0.3, "counts": (25, 50, 100, 250), "views": (1, 3, 6), "seeds": (0, 1, 2)},
    "efficientnet": {"macs": 0.7, "counts": (100, 250), "views": (1, 3), "seeds": (0,)},
}
"""Share of the MACs that stays, and what is tried."""

POOL = 4000
"""Training images of CIFAR-10 that each seed draws from."""


def draw(images: Tensor, count: int, seed: int) -> list[tuple[Tensor]]:
    """`count` images in at least five batches, another draw for each seed."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return [(images[c],) for c in chosen.split(min(50, -(-count // 5)))]


def measured(
    model: nn.Module, images: Tensor, test: tuple[Tensor, Tensor], case: dict[str, Any]
) -> list[dict[str, Any]]:
    """Top-1 for every count, number of views and seed."""
    found = []
    for count in case["counts"]:
        for views in case["views"]:
            for seed in case["seeds"]:
                result = sc.prune(
                    model, draw(images, count, seed), sc.Budget(macs=case["macs"]), sc.RepairAware(),
                    repair="reconstruct", views=views, measure_latency=False, seed=seed, progress=False,
                )  # fmt: skip
                accuracy = top1(result.model, *test, batch=50)
                row = {
                    "images": count, "views": views, "seed": seed, "top1": accuracy,
                    "macs": result.plan.predicted.macs / result.plan.dense.macs,
                }  # fmt: skip
                found.append(row)
                print(row, file=sys.stderr, flush=True)
    return found


def shown(rows: list[dict[str, Any]], views: tuple[int, ...]) -> str:
    """A table: a row for each number of images, a column for each number of views; means over seeds."""

    def cell(count: int, number: int) -> str:
        mine = [r["top1"] for r in rows if (r["images"], r["views"]) == (count, number)]
        return f"{100 * statistics.mean(mine):.1f}"

    counts = dict.fromkeys(r["images"] for r in rows)
    titles = ("images", *(f"{n} view" + "s" * (n > 1) for n in views))
    return results.table(titles, [(count, *(cell(count, n) for n in views)) for count in counts])


def main() -> None:
    """Runs the networks named on the command line, or both, and writes the result file."""
    warnings.simplefilter("ignore")
    asked = sys.argv[1:] or list(CASES)
    content = {k: v for k, v in (results.read("views") or {}).items() if k in CASES}
    for name in asked:
        if name == "resnet20":
            model, images, test = trained(), cifar.load("train", POOL)[0], cifar.load("test")
        else:
            model, (every, labels) = imagenet.efficientnet_lite0(), imagenet.load()
            images, test = every[:250], (every[250:], labels[250:])
        case = CASES[name]
        dense = top1(model, *test, batch=50)
        rows = measured(model, images, test, case)
        print(
            f"\n{name} at {case['macs']} of the MACs, dense {100 * dense:.1f}\n{shown(rows, case['views'])}"
        )
        content[name] = {"dense": dense, "macs": case["macs"], "runs": rows}
    results.write("views", content)


if __name__ == "__main__":
    main()
