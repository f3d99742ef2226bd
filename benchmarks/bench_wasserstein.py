"""The U-Score with a thousand classes, and at which stage of a layer it should be observed.

python -m benchmarks.bench_wasserstein [--channels N] [--brute N] [--seeds N] [--images N]

A thousand classes of samples of convolutions' maps, drawn at random in ways that make the largest distance
easy or hard to find. All pairs are timed on a few channels, and scaled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import secateur as sc
from benchmarks import cifar, results
from benchmarks.bench_resnet20 import calibration
from benchmarks.bench_signals import measured, streams
from benchmarks.resnet20 import top1, trained
from secateur.signals.units import wasserstein
from secateur.signals.units.wasserstein import directions, largest_distance

CLASSES, PER_CLASS, PROJECTIONS, MAP = 1000, 32, 32, 49
TARGET = 60.0
BUDGETS = (0.7, 0.5)
STAGES = ("produced", "normalised", "activated")

Maps = Callable[[NDArray[np.int64], int, torch.Generator], Tensor]
"""From each sample's class and a number of channels to maps. [samples, channels, MAP]"""


def means_and_noise(labels: NDArray[np.int64], channels: int, random: torch.Generator) -> Tensor:
    """Each class has a level and a mean map; samples are normal around it."""
    level = 0.5 * torch.randn(CLASSES, channels, 1, generator=random)
    mean = 0.25 * torch.randn(CLASSES, channels, MAP, generator=random)
    return (level + mean)[labels] + torch.randn(len(labels), channels, MAP, generator=random)


def heavy_tails(labels: NDArray[np.int64], channels: int, random: torch.Generator) -> Tensor:
    """Log-normal strengths of classes, and zeros from a ReLU."""
    strength = torch.randn(CLASSES, channels, 1, generator=random).exp()
    drawn = torch.randn(len(labels), channels, MAP, generator=random)
    return (strength[labels] * (drawn - 0.5)).relu()


def noise_alone(labels: NDArray[np.int64], channels: int, random: torch.Generator) -> Tensor:
    """No class differs from another but by chance."""
    return torch.randn(len(labels), channels, MAP, generator=random)


def projected(maps: Maps, labels: NDArray[np.int64], channels: int) -> Tensor:
    """What the signal keeps of such maps. [samples, channels, PROJECTIONS]"""
    random = torch.Generator().manual_seed(0)
    theta = directions(MAP, PROJECTIONS, seed=0).float()
    return torch.cat([maps(labels, len(c), random) @ theta for c in torch.arange(channels).split(8)], dim=1)


def equidistant(labels: NDArray[np.int64], channels: int) -> Tensor:
    """Every two classes are equally far apart, so that no pair can be skipped. Needs equal class sizes."""
    samples = torch.empty(CLASSES, PER_CLASS, channels, PROJECTIONS)
    samples[:] = torch.arange(PER_CLASS)[:, None, None]
    for label in range(CLASSES):
        samples[label, label % PER_CLASS, :, label // PER_CLASS] += 0.5
    rank_in_class = np.argsort(np.argsort(labels, kind="stable")) - labels * PER_CLASS
    return samples[labels, rank_in_class]


def all_pairs(points: Tensor, block: int = 64) -> Tensor:
    """The diameter by brute force: each pair once, in blocks. [sets, points, coordinates] -> [sets]"""
    return torch.stack(
        [
            torch.stack(
                [torch.cdist(p[i : i + block], p[i:], p=1.0).max() for i in range(0, len(p), block)]
            ).max()
            for p in points
        ]
    )


def visited_share(samples: Tensor, labels: NDArray[np.int64]) -> float:
    """Distances computed, those to anchors among them, as a share of the pairs."""
    count = 0
    original = torch.cdist

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        found = original(*args, **kwargs)
        count += found.numel()
        return found

    with mock.patch.object(torch, "cdist", counting):
        largest_distance([samples], labels)
    return count / (samples.shape[1] * CLASSES * (CLASSES - 1) / 2)


def at_scale(channels: int, brute: int) -> list[dict[str, Any]]:
    """Seconds for all channels, ours and by all pairs, and how far the two are from each other."""
    equal = np.arange(CLASSES * PER_CLASS) % CLASSES
    random = np.random.default_rng(0)
    unequal = random.permutation(np.repeat(np.arange(CLASSES), random.integers(1, PER_CLASS + 1, CLASSES)))
    cases: list[tuple[str, NDArray[np.int64], Callable[[int], Tensor], int]] = [
        ("class means and noise", equal, lambda n: projected(means_and_noise, equal, n), channels),
        ("heavy tails, ReLU zeros", equal, lambda n: projected(heavy_tails, equal, n), channels),
        ("noise alone", equal, lambda n: projected(noise_alone, equal, n), channels),
        ("class sizes 1 to 32", unequal, lambda n: projected(means_and_noise, unequal, n), channels // 8),
        ("equidistant", equal, lambda n: equidistant(equal, n), brute),
    ]
    rows = []
    for name, labels, draw, count in cases:
        count = max(count, brute)
        samples = draw(count)
        start = time.perf_counter()
        found = largest_distance([samples], labels)
        seconds = time.perf_counter() - start
        few = samples[:, :brute].clone()
        start = time.perf_counter()
        with mock.patch.object(wasserstein, "diameters", all_pairs):
            expected = largest_distance([few], labels)
        all_seconds = (time.perf_counter() - start) / brute
        rows.append(
            {
                "data": name,
                "channels_timed": count,
                "seconds": seconds * channels / count,
                "all_pairs_channels_timed": brute,
                "all_pairs_seconds": all_seconds * channels,
                "visited_share": visited_share(few, labels),
                "largest_relative_difference": float(np.max(np.abs(found[:brute] / expected - 1))),
            }
        )
        print(f"{name}: {rows[-1]['seconds']:.1f} s", flush=True)
    return rows


def by_stage(seeds: int, test_images: int) -> tuple[list[dict[str, Any]], float]:
    """Top-1 of ResNet-20 pruned by each stage's scores, after batch-norm re-estimation; and dense."""
    model = trained()
    images, labels = cifar.load("train", 5000)
    test = cifar.load("test", test_images)
    runs = []
    for seed in range(seeds):
        data = calibration(seed, images, labels)
        graph = sc.trace(model, data[0][0])
        for stage in STAGES:
            scores = sc.score(graph, data, (sc.signals.Wasserstein(stage=stage), "taylor"), progress=False)
            for scope, ignored in (("inner", streams(graph)), ("all", ())):
                for rule in (sc.ToD(), sc.Uniform(removal="wasserstein")):
                    for budget in BUDGETS:
                        limits = sc.Limits(ignore=ignored)
                        plan = rule.allocate(graph, scores, sc.Budget(macs=budget), limits)
                        runs.append(
                            {
                                "seed": seed, "stage": stage, "scope": scope, "rule": rule.name,
                                "budget": budget, **measured(model, graph, data, plan, test),
                            }
                        )  # fmt: skip
    return runs, top1(model, *test)


def stage_rows(runs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row a stage and scope: mean and standard deviation of top-1 over the seeds."""
    columns = [(rule, budget) for budget in BUDGETS for rule in ("tod", "uniform")]
    rows = []
    for scope in ("inner", "all"):
        for stage in STAGES:
            cells = []
            for rule, budget in columns:
                wanted = (stage, scope, rule, budget)
                found = [
                    r["top1"] for r in runs if (r["stage"], r["scope"], r["rule"], r["budget"]) == wanted
                ]
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                cells.append(f"{statistics.mean(found):.3f} ± {spread:.3f}")
            rows.append((stage, scope, *cells))
    return rows


def main() -> None:
    """Runs both parts, prints the tables and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--brute", type=int, default=8, help="channels on which all pairs are compared")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=3000, help="test images")
    asked = parser.parse_args()
    scale = at_scale(asked.channels, asked.brute)
    print(
        f"\n{CLASSES} classes, at most {PER_CLASS} samples each, {asked.channels} channels, "
        f"{PROJECTIONS} projections; seconds for all channels (target {TARGET:.0f}), "
        "scaled where fewer were timed"
    )
    rows = [
        (
            r["data"], r["channels_timed"], f"{r['seconds']:.1f}", f"{r['all_pairs_seconds']:.1f}",
            f"{r['seconds'] / r['all_pairs_seconds']:.3f}", f"{r['visited_share']:.4f}",
            f"{r['largest_relative_difference']:.0e}",
        )
        for r in scale
    ]  # fmt: skip
    print(results.table(("data", "timed", "ours", "all pairs", "ratio", "visited", "difference"), rows))
    runs, dense = by_stage(asked.seeds, asked.images)
    print(
        f"\nResNet-20 by the stage that wasserstein observes, top-1 after batch-norm re-estimation, "
        f"dense {dense:.3f}, mean and standard deviation over {asked.seeds} calibration seeds"
    )
    headings = ("stage", "scope", *(f"{rule} {budget}" for budget in BUDGETS for rule in ("tod", "uniform")))
    print(results.table(headings, stage_rows(runs)))
    results.write(
        "wasserstein",
        {"target_seconds": TARGET, "scale": scale, "stages": {"dense_top1": dense, "runs": runs}},
    )


if __name__ == "__main__":
    main()
