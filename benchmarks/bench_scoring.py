"""What scoring costs: against the authors' package, against one pass over the data, and as data grow.

python -m benchmarks.bench_scoring [--images N] [--rounds N] [--no-peer]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from benchmarks import cifar, peer_network_pruner, results
from benchmarks.environment import measure
from benchmarks.resnet20 import ResNet20, trained

BATCH = 100
PER_CLASS = 32
PEER_PROJECTIONS = 128
PEER_TARGET = 40.0
TARGET = 2.0
SIGNALS = ("wasserstein", "taylor")

Data = list[tuple[Tensor, Tensor]]


def batches(images: Tensor, labels: Tensor) -> Data:
    """Images and labels in batches."""
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, taken in turns; one more round before warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def against_one_pass(model: nn.Module, data: Data, rounds: int) -> dict[str, Any]:
    """Sets of signals against one plain forward and backward pass over the same images."""
    graph = sc.trace(model, data[0][0])
    train = [p for p in model.parameters() if p.requires_grad]
    chosen: dict[str, tuple[str | sc.signals.Signal, ...]] = {
        "wasserstein, taylor": SIGNALS,
        "wasserstein, taylor, magnitude": (*SIGNALS, "magnitude"),
        "wasserstein alone": ("wasserstein",),
        "taylor alone": ("taylor",),
        f"wasserstein ({PEER_PROJECTIONS} projections), taylor": (
            sc.signals.Wasserstein(projections=PEER_PROJECTIONS, per_class=PER_CLASS),
            "taylor",
        ),
    }

    def plain() -> None:
        for images, labels in data:
            torch.autograd.grad(F.cross_entropy(model(images), labels), train)

    def scored(signals: tuple[str | sc.signals.Signal, ...]) -> Callable[[], Any]:
        return lambda: sc.score(graph, data, signals, progress=False)

    runs = {"forward and backward": plain, **{name: scored(signals) for name, signals in chosen.items()}}
    seconds = interleaved(runs, rounds)
    base = seconds["forward and backward"]
    ratios = {
        name: statistics.median(s / p for s, p in zip(taken, base, strict=True))
        for name, taken in seconds.items()
    }
    return {"seconds": seconds, "median_ratio": ratios, "target": TARGET}


def against_peer(model: nn.Module, images: int, seconds: float) -> dict[str, Any]:
    """One run of the peer on the same model, images, classes and samples, against our `seconds`."""
    peer = peer_network_pruner.measured(images, PER_CLASS)
    if "error" in peer:
        return peer
    data = batches(*cifar.load("train", images))
    graph = sc.trace(model, data[0][0])
    wide = sc.signals.Wasserstein(projections=PEER_PROJECTIONS, per_class=PER_CLASS)
    scores = sc.score(graph, data, (wide, "taylor"), progress=False)
    agreement = {}
    for theirs, ours in (("distance", "wasserstein"), ("sensitivity", "taylor")):
        inner = [
            g for g in graph.groups if g.name in peer[theirs] and len({s.producer for s in g.sites}) == 1
        ]
        agreement[theirs] = [rank_correlation(peer[theirs][g.name], scores[ours][g.name]) for g in inner]
    return {
        **peer,
        "speedup": peer["seconds"] / seconds,
        "target": PEER_TARGET,
        "rank_correlation": agreement,
    }


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, without ties."""
    first, second = (np.argsort(np.argsort(np.asarray(v))) for v in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


class Plain(nn.Module):
    """Convolutions of one width, one after the other."""

    def __init__(self, layers: int, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width] to [batch, classes]."""
        x = F.relu(self.stem(x))
        for layer in self.body:
            x = F.relu(layer(x))
        return self.head(x.mean(dim=(2, 3)))


def cost(model: nn.Module, data: Data, rounds: int) -> float:
    """Median seconds of scoring."""
    graph = sc.trace(model, data[0][0])
    return measure(lambda: sc.score(graph, data, SIGNALS, progress=False), rounds).median


def growth(images: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds against the number of images, classes and layers, one of them varied at a time."""
    found: dict[str, list[dict[str, Any]]] = {"images": [], "classes": [], "layers": []}
    x, y = cifar.load("train", 8 * images)
    for times in (1, 2, 4, 8):
        few = times * images
        seconds = cost(trained(), batches(x[:few], y[:few]), rounds)
        found["images"].append(
            {"images": few, "seconds": seconds, "milliseconds_an_image": 1000 * seconds / few,
             "peak_mib": peak_memory(few)}
        )  # fmt: skip
    for classes in (10, 40, 160, 640):
        torch.manual_seed(0)
        seconds = cost(ResNet20(classes).eval(), batches(x, torch.arange(len(x)) % classes), rounds)
        found["classes"].append({"classes": classes, "images": len(x), "seconds": seconds})
    for layers in (4, 8, 16, 32):
        torch.manual_seed(0)
        seconds = cost(Plain(layers).eval(), batches(x[:images], y[:images]), rounds)
        found["layers"].append(
            {"layers": layers, "seconds": seconds, "milliseconds_a_layer": 1000 * seconds / layers}
        )
    return found


class Drawn:
    """Random images, made when they are asked for, so that the data take no memory."""

    def __init__(self, images: int) -> None:
        self._images = images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images and labels."""
        for start in range(0, self._images, BATCH):
            random = torch.Generator().manual_seed(start)
            size = min(BATCH, self._images - start)
            yield torch.randn(size, 3, 32, 32, generator=random), torch.arange(start, start + size) % 10


def peak_memory(images: int) -> float:
    """Most MiB that a process which scores so many images ever held."""
    command = [sys.executable, "-m", "benchmarks.bench_scoring", "--peak", str(images)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(images: int) -> None:
    """Scores, then prints the most MiB that this process ever held."""
    model = ResNet20().eval()
    sc.score(sc.trace(model, torch.randn(BATCH, 3, 32, 32)), Drawn(images), SIGNALS, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Runs everything, prints the tables and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        print_peak(asked.peak)
        return
    model = trained()
    data = batches(*cifar.load("train", asked.images))
    one_pass = against_one_pass(model, data, asked.rounds)
    print(
        f"ResNet-20, {asked.images} images, median of {asked.rounds} interleaved rounds "
        f"(target {TARGET}, then 1.5)"
    )
    rows = [
        (name, f"{statistics.median(taken):.3f}", f"{one_pass['median_ratio'][name]:.2f}")
        for name, taken in one_pass["seconds"].items()
    ]
    print(results.table(("signals", "seconds", "ratio"), rows))
    peer: dict[str, Any] = {"error": "left out"}
    if not asked.no_peer:
        ours = statistics.median(one_pass["seconds"][f"wasserstein ({PEER_PROJECTIONS} projections), taylor"])
        peer = against_peer(model, asked.images, ours)
    if "error" in peer:
        print(f"\nnetwork-pruner: no figures: {peer['error']}")
    else:
        print(
            f"\nnetwork-pruner {peer['version']} on the same images, {PER_CLASS} samples a class, "
            f"{PEER_PROJECTIONS} projections: {peer['seconds']:.1f} s in one run, "
            f"{peer['speedup']:.0f} times ours (target {PEER_TARGET:.0f}); "
            f"it changed {peer['tensors_changed']} tensors of the model.\n"
            "Median rank correlation with ours over layers outside the residual streams: "
            + ", ".join(f"{k} {statistics.median(v):.3f}" for k, v in peer["rank_correlation"].items())
        )
    tables = growth(asked.images, max(1, asked.rounds // 2))
    for name, found in tables.items():
        print(f"\ncost against {name}, signals {', '.join(SIGNALS)}")
        cells = [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in found]
        print(results.table(tuple(k.replace("_", " ") for k in found[0]), cells))
    results.write("scoring", {"images": asked.images, "one_pass": one_pass, "peer": peer, "growth": tables})


if __name__ == "__main__":
    main()
