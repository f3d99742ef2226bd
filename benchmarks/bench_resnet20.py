"""The main job on ResNet-20: accuracy before, after, and after repair; cost of scoring.

python -m benchmarks.bench_resnet20
"""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
from torch.nn import functional as F

import secateur as sc
from benchmarks import cifar, results
from benchmarks.resnet20 import make, top1, trained

SEEDS = (0, 1, 2)
CALIBRATION = 500
BUDGET = 0.6
ROUNDS = 7


Data = list[tuple[torch.Tensor, torch.Tensor]]


def calibration(seed: int, images: torch.Tensor, labels: torch.Tensor) -> Data:
    """`CALIBRATION` training images in batches of 100, another draw for each seed."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    return [(images[c], labels[c]) for c in chosen.split(100)]


def scoring(model: torch.nn.Module, data: Data) -> dict[str, object]:
    """Seconds of all signals and of one plain forward and backward pass over the same images, interleaved."""
    graph = sc.trace(model, data[0][0])
    train = [p for p in model.parameters() if p.requires_grad]

    def plain() -> None:
        for images, labels in data:
            torch.autograd.grad(F.cross_entropy(model(images), labels), train)

    def scored() -> None:
        sc.score(graph, data, ("wasserstein", "taylor", "magnitude"), progress=False)

    seconds: dict[str, list[float]] = {"plain": [], "scored": []}
    for turn in range(ROUNDS + 1):  # the first round warms up
        for name, run in (("plain", plain), ("scored", scored)):
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ratios = [s / p for s, p in zip(seconds["scored"], seconds["plain"], strict=True)]
    return {"seconds": seconds, "ratios": ratios, "median_ratio": statistics.median(ratios), "target": 3.0}


def main() -> None:
    """Runs all seeds and allocators, prints the tables and writes the result file."""
    model = trained()
    images, labels = cifar.load("train", 5000)
    test_images, test_labels = cifar.load("test")
    test = [(x, y) for x, y in zip(test_images.split(250), test_labels.split(250), strict=True)]
    cost = scoring(model, calibration(0, images, labels))
    dense = top1(model, test_images, test_labels)
    runs = []
    for seed in SEEDS:
        for allocator in (sc.ToD(), sc.Uniform()):
            result = sc.prune(
                model,
                calibration(seed, images, labels),
                sc.Budget(macs=BUDGET),
                allocator,
                evaluation=test,
                measure_latency=False,
                seed=seed,
                progress=False,
            )
            with tempfile.TemporaryDirectory() as folder:
                sc.save(result.model, folder)
                again = sc.load(folder, make)
            stored, wanted = again.state_dict(), result.model.state_dict()
            same = all(torch.equal(stored[k], wanted[k]) for k in wanted)
            with torch.no_grad():
                same = same and torch.equal(again(test_images[:250]), result.model(test_images[:250]))
            by_stage = {f.stage: f for f in result.report.figures}
            runs.append(
                {
                    "seed": seed,
                    "allocator": result.plan.allocator,
                    "settings": result.plan.settings,
                    "macs": result.plan.predicted.macs / result.plan.dense.macs,
                    "params": result.plan.predicted.params / result.plan.dense.params,
                    "kept": {g.name: [g.kept, g.size] for g in result.plan.groups},
                    "top1_pruned": by_stage["pruned"].accuracy,
                    "top1_repaired": by_stage.get("repaired", by_stage["pruned"]).accuracy,
                    "form": result.report.form,
                    "proof": result.report.proof["difference"],
                    "reloaded_bit_for_bit": same,
                    "seconds": result.report.seconds,
                }
            )
    rows = [
        (
            r["allocator"], r["seed"], f"{r['macs']:.3f}", f"{r['params']:.3f}", f"{dense:.3f}",
            f"{r['top1_pruned']:.3f}", f"{r['top1_repaired']:.3f}", f"{r['proof']:.0e}",
            r["reloaded_bit_for_bit"],
        )
        for r in runs
    ]  # fmt: skip
    print(f"ResNet-20, CIFAR-10 (JPEG), {CALIBRATION} calibration images, budget {BUDGET} of the MACs, "
          f"top-1 on {len(test_labels)} test images")  # fmt: skip
    headings = ("allocator", "seed", "MACs", "params", "dense", "pruned", "repaired", "proof", "reloaded")
    print(results.table(headings, rows))
    print(
        f"\nscoring (wasserstein, taylor, magnitude) takes {cost['median_ratio']:.2f} times one forward and "
        f"backward pass over the same {CALIBRATION} images (median of {ROUNDS} interleaved rounds; target 3)"
    )
    results.write("resnet20", {"dense_top1": dense, "budget": BUDGET, "runs": runs, "scoring": cost})


if __name__ == "__main__":
    main()
