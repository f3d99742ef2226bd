"""What training without labels adds to the closed form: `reconstruct` alone, and `polish` after it.

    python -m benchmarks.bench_polish [resnet20] [efficientnet] [settings] [--rule depth] [--macs 0.5]
        [--passes 40] [--rate 0.0005]

Plans are those of the repair-aware rule, of the same by depth (`parts=4`), or of the search. Scores and the
closed form read pictures as they are, `polish` in three views (`sc.Views`). No labels are read; they only
measure. ResNet-20 is pruned inside its blocks, with 1,000 training images, and measured on the 3,000 test
images; EfficientNet-Lite0 everywhere, with 350 pictures of ImageNet, and measured on the other 150.
`settings` is ResNet-20 at half of the MACs with other settings of `polish`, to be judged by the distance on
held-out calibration data. Rows are added to the result file as they are found; one of the same settings is
replaced.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks import bench_repair, cifar, imagenet, results
from benchmarks.resnet20 import top1, trained

MACS = {"resnet20": (0.68, 0.58, 0.5), "efficientnet": (0.8, 0.7, 0.5)}
"""Shares of the MACs that stay."""

RULES: dict[str, Any] = {
    "repair_aware": sc.RepairAware(),
    "depth": sc.RepairAware(parts=4),
    "search": sc.Search(),
}

CALIBRATED = 350
"""Pictures of ImageNet that calibrate; the other 150 measure."""

SETTINGS: dict[str, dict[str, Any]] = {
    "as default": {},
    "outputs only": {"features": 0.0},
    "features less": {"features": 1.0},
    "batch 100": {"batch": 100},
    "rate 0.0005": {"learning_rate": 0.0005},
    "rate 0.002": {"learning_rate": 0.002},
}


@dataclass(frozen=True, eq=False)
class Case:
    """One network with its data.

    Attributes:
        name: The network's name.
        model: The dense network.
        draw: Seed -> images to calibrate with, and images with labels to measure on.
        limits: Graph -> what must stay.
    """

    name: str
    model: nn.Module
    draw: Callable[[int], tuple[Sequence[tuple[Tensor, ...]], tuple[Tensor, Tensor]]]
    limits: Callable[[sc.Graph], sc.Limits]


def resnet20() -> Case:
    """ResNet-20 on CIFAR-10."""
    train, test = cifar.load("train", bench_repair.POOL)[0], cifar.load("test")
    return Case(
        "resnet20",
        trained(),
        lambda seed: (bench_repair.draw(seed, bench_repair.IMAGES, train), test),
        bench_repair.inner,
    )


def efficientnet() -> Case:
    """EfficientNet-Lite0 on 500 pictures of ImageNet."""
    images, labels = imagenet.load()

    def draw(seed: int) -> tuple[Sequence[tuple[Tensor, ...]], tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        chosen, rest = order[:CALIBRATED], order[CALIBRATED:]
        return [(images[c],) for c in chosen.split(50)], (images[rest], labels[rest])

    return Case("efficientnet", imagenet.efficientnet_lite0(), draw, lambda graph: sc.Limits())


CASES = {"resnet20": resnet20, "efficientnet": efficientnet}


def measured(case: Case, rule: str, macs: Sequence[float], seed: int, polishes: dict[str, sc.Polish]) -> None:
    """Prune, repair and measure at each share of the MACs; add a row for each polish to the result file."""
    images, test = case.draw(seed)
    views = sc.Calibration.of(images, views=3)
    graph = sc.trace(case.model, images[0][0][:2])
    dense = top1(case.model, *test, batch=50)
    for share in macs:
        begun = time.process_time()
        result = sc.prune(
            case.model, images, sc.Budget(macs=share), RULES[rule], repair="reconstruct",
            limits=case.limits(graph), measure_latency=False, seed=seed, progress=False,
        )  # fmt: skip
        seconds, plan = time.process_time() - begun, result.plan
        for title, polish in polishes.items():
            begun = time.process_time()
            polished = sc.repair(
                result.model, case.model, views, polish, graph=graph, seed=seed, progress=False
            )
            trained_for = time.process_time() - begun
            tried = sc.record_of(polished).repairs[-1]
            row = {
                "network": case.name, "rule": rule, "macs": share, "seed": seed, "polish": title,
                "settings": asdict(polish),
                "reached": plan.predicted.macs / plan.dense.macs, "dense": dense,
                "reconstruct": top1(result.model, *test, batch=50),
                "polished": top1(polished, *test, batch=50), "passes": tried["passes"], "kept": tried["kept"],
                "distance": [tried["before"], tried["after"]],
                "processor_seconds": {"reconstruct": seconds, "polish": trained_for},
            }  # fmt: skip
            print(row, flush=True)
            add(row)


def add(row: dict[str, Any]) -> None:
    """Add a row to the result file, in place of one of the same settings."""
    keys = ("network", "rule", "macs", "seed", "polish")
    rows = (results.read("polish") or {}).get("runs", [])
    rows = [r for r in rows if any(r[k] != row[k] for k in keys)]
    results.write("polish", {"runs": [*rows, row]})


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """A table: means over the seeds."""
    lines, stages = [], ("dense", "reconstruct", "polished")
    for key in dict.fromkeys((r["network"], r["rule"], r["macs"], r["polish"]) for r in rows):
        mine = [r for r in rows if (r["network"], r["rule"], r["macs"], r["polish"]) == key]
        points = (f"{100 * statistics.mean(r[k] for r in mine):.1f}" for k in stages)
        minutes = statistics.mean(r["processor_seconds"]["polish"] for r in mine) / 60
        far = (f"{statistics.mean(r['distance'][k] for r in mine):.4f}" for k in (0, 1))
        lines.append((*key, len(mine), *points, *far, f"{minutes:.1f}"))
    titles = ("network", "rule", "MACs", "polish", "draws", *stages, "distance", "after", "minutes")
    return results.table(titles, lines)


def main() -> None:
    """Runs what the command line names, or both networks, and prints all rows that the result file has."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=[*CASES], choices=[*CASES, "settings"])
    parser.add_argument("--rule", default="repair_aware", choices=[*RULES])
    parser.add_argument("--macs", nargs="*", type=float)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.001)
    asked = parser.parse_args()
    for part in asked.parts:
        case = CASES["resnet20" if part == "settings" else part]()
        title = f"{asked.passes} passes"
        if asked.rate != 0.001:
            title += f", rate {asked.rate}"
        polishes = {title: sc.Polish(passes=asked.passes, learning_rate=asked.rate)}
        if part == "settings":
            polishes = {name: sc.Polish(passes=asked.passes, **more) for name, more in SETTINGS.items()}
        for seed in asked.seeds:
            macs = asked.macs or ((0.5,) if part == "settings" else MACS[part])
            measured(case, asked.rule, macs, seed, polishes)
    print(shown((results.read("polish") or {"runs": []})["runs"]))


if __name__ == "__main__":
    main()
