"""Where each rule stops being recoverable: ResNet-20 and a VGG with batch norm, 80 to 97 % of weights gone.

    python -m benchmarks.bench_transition [--model ...] [--repairs ...] [--seeds N] [--quick]

Every rule's allocation gets the same repairs, each by itself: ``channelwise``, plain variance matching, and
``variance``, the same with adaptive shrinkage (ASR). Printed are the medians of top-1 over seeds, the rule
that leads at each sparsity, up to where each rule keeps 95 % of the dense top-1, and Spearman's rank
correlation, over layers, between the residual distortion that Repairability predicted for each layer pruned
alone and the one measured after the whole network was pruned and repaired. All runs go to
`benchmarks/results/transition_<model>.json`, which is written anew after each seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.small_networks import network
from secateur.allocators import ERK, LAMP, Repairability
from secateur.targets.weights.transition import REPAIRS, Masked, Point, Transition, allocations
from secateur.targets.weights.weights import layers_of

SPARSITIES = (0.8, 0.85, 0.9, 0.92, 0.94, 0.955, 0.97)
SHARE = 0.95
"""What of the dense top-1 counts as recovered."""

RULES: dict[str, Any] = {
    "uniform": "uniform",
    "erk": ERK(),
    "erk, cap 0.5": ERK(cap=0.5),
    "lamp": LAMP(),
    "repairability": Repairability(),
}


def calibration(images: int, seed: int) -> sc.Calibration:
    """Training images, chosen by the seed."""
    x, y = cifar.load("train", 8 * images)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:images]
    return sc.Calibration.of([(x[k], y[k]) for k in order.split(64)])


def residuals(dense: nn.Module, small: nn.Module, data: sc.Calibration) -> dict[str, float]:
    """For each weight, the squared error of its layer's outputs, over the sum of their squares."""
    error: dict[str, float] = {}
    scale: dict[str, float] = {}
    for batch in data:
        wanted, got = _outputs(dense, batch.args), _outputs(small, batch.args)
        for name, y in wanted.items():
            error[name] = error.get(name, 0.0) + float((got[name] - y).double().square().sum())
            scale[name] = scale.get(name, 0.0) + float(y.double().square().sum())
    return {name: error[name] / (scale[name] or 1.0) for name in error}


@torch.no_grad()
def _outputs(model: nn.Module, args: tuple[Any, ...]) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = []
    for name, layers in layers_of(model).items():

        def see(module: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
            found[name] = output

        handles.append(layers[0].register_forward_hook(see))
    model(*args)
    for handle in handles:
        handle.remove()
    return found


def one_seed(name: str, given: argparse.Namespace, test: sc.Calibration, seed: int) -> dict[str, Any]:
    """Every rule at every sparsity, with every repair."""
    model, data = network(name), calibration(given.images, seed)
    graph = sc.trace(model, data.first().args)
    dense = sc.evaluate(model, test)
    points: dict[str, list[dict[str, Any]]] = {repair: [] for repair in given.repairs}
    for rule, sparsity, plan in allocations(model, data, RULES, given.sparsities, seed=seed):
        for repair in given.repairs:
            small = sc.apply(model, plan, graph=graph)
            REPAIRS[repair](Masked(small, model, plan, graph), data)
            found = sc.evaluate(small, test)
            point = {"rule": rule, "sparsity": sparsity, "loss": found.loss, "accuracy": found.accuracy}
            if rule == "repairability":
                predicted: Any = plan.certificates["residual"]
                left = residuals(model, small, data)
                names = sorted(predicted)
                pairs = [predicted[n] for n in names], [left[n] for n in names]
                point["spearman"] = float(spearmanr(*pairs).statistic)
            points[repair].append(point)
    last = {
        repair: {rule: Transition(dense, tuple(_point(p) for p in found), SHARE).last(rule) for rule in RULES}
        for repair, found in points.items()
    }
    return {"seed": seed, "dense": dense.accuracy, "last": last, "points": points}


def _point(found: Mapping[str, Any]) -> Point:
    return Point(found["rule"], found["sparsity"], found["loss"], found["accuracy"])


def medians_of(runs: Sequence[dict[str, Any]], repair: str) -> dict[str, dict[str, float]]:
    """Over seeds: by sparsity, the top-1 of each rule, and Spearman's correlation."""
    points = [point for run in runs for point in run["points"][repair]]
    found: dict[str, dict[str, float]] = {}
    for s in sorted({p["sparsity"] for p in points}):
        here = [p for p in points if p["sparsity"] == s]
        found[str(s)] = {
            rule: statistics.median(p["accuracy"] for p in here if p["rule"] == rule)
            for rule in RULES
            if any(p["rule"] == rule for p in here)
        }
        correlations = [p["spearman"] for p in here if "spearman" in p]
        if correlations:
            found[str(s)]["spearman"] = statistics.median(correlations)
    return found


def report(name: str, repair: str, runs: Sequence[dict[str, Any]]) -> None:
    """Prints the medians over seeds."""
    rows = []
    for s, found in medians_of(runs, repair).items():
        by_rule = {rule: found[rule] for rule in RULES if rule in found}
        tops = [f"{100 * by_rule[rule]:.1f}" if rule in by_rule else "-" for rule in RULES]
        best = max(by_rule, key=by_rule.__getitem__)
        rows.append([f"{float(s):.1%}", *tops, best, f"{found.get('spearman', math.nan):.2f}"])
    dense = statistics.median(run["dense"] for run in runs)
    print(f"\n{name}, repaired by {repair}; dense top-1 {100 * dense:.1f} %, {len(runs)} seeds\n")
    print(results.table(["sparsity", *RULES, "leads", "Spearman"], rows))
    for rule in RULES:
        ends = sorted(run["last"][repair][rule] or 0.0 for run in runs)
        print(f"{rule}: keeps {SHARE:.0%} of the dense top-1 up to {ends[len(ends) // 2]:.1%}")


def compare(name: str, given: argparse.Namespace) -> None:
    """One network: every seed."""
    test = sc.Calibration.of(list(zip(*(t.split(250) for t in cifar.load("test", given.test)), strict=True)))
    runs: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        runs.append(one_seed(name, given, test, seed))
        medians = {repair: medians_of(runs, repair) for repair in given.repairs}
        if not given.dry:
            results.write(f"transition_{name}", {"arguments": vars(given), "medians": medians, "runs": runs})
    for repair in given.repairs:
        report(name, repair, runs)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["resnet20", "vgg16_bn"])
    parser.add_argument("--repairs", nargs="+", choices=tuple(REPAIRS), default=["channelwise", "variance"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    parser.add_argument("--quick", action="store_true", help="one seed, two sparsities, little data; dry")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.sparsities, given.images, given.test, given.dry = 1, [0.85, 0.94], 64, 250, True
    for name in given.model:
        compare(name, given)


if __name__ == "__main__":
    main()
