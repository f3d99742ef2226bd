"""Where each rule stops being recoverable: ResNet-20 and a VGG with batch norm, 80 to 97 % of weights gone.

    python -m benchmarks.bench_transition [--model ...] [--repairs ...] [--sparsities ...] [--seeds N]

Every rule's allocation gets the same repair. Printed are the medians of top-1 over seeds, the rule that leads
at each sparsity, where each rule loses more than 5 % of the dense top-1, and Spearman's rank correlation
between the residual distortion that Repairability predicted for each layer pruned alone and the one measured
after the whole network was pruned and repaired. All runs go to `benchmarks/results/transition.json`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.small_networks import network
from secateur import masks
from secateur.allocate import ERK, LAMP, Budget, Repairability
from secateur.masks.prune import measured
from secateur.masks.transition import REPAIRS, sweep
from secateur.masks.weights import layers_of

SPARSITIES = (0.8, 0.85, 0.9, 0.92, 0.94, 0.955, 0.97)
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


def prediction(model: nn.Module, data: sc.Calibration, sparsity: float, repair: str, seed: int) -> float:
    """Spearman's correlation of the predicted and the measured residuals, over layers."""
    scores = masks.score(model, None, "magnitude", seed=seed)
    rule = measured(Repairability(), model, data, scores)
    plan = masks.allocate(masks.Weights.of(model), scores, rule, Budget(sparsity=sparsity), seed=seed)
    graph = sc.trace(model, data.first().args)
    small = masks.apply(model, plan, graph)
    REPAIRS[repair](small, graph, data)
    predicted: Any = plan.certificates["residual"]
    found = residuals(model, small, data)
    names = sorted(predicted)
    return float(spearmanr([predicted[n] for n in names], [found[n] for n in names]).statistic)


def compare(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One network: every rule, repair and seed."""
    model = network(name)
    test = sc.Calibration.of(list(zip(*(t.split(250) for t in cifar.load("test", given.test)), strict=True)))
    content: dict[str, Any] = {}
    for repair in given.repairs:
        runs, ranks = [], []
        for seed in range(given.seeds):
            data = calibration(given.images, seed)
            found = sweep(model, data, test, RULES, given.sparsities, repair=repair, seed=seed)
            last = {rule: found.last(rule) for rule in RULES}
            points = [{"seed": seed, **vars(point)} for point in found.points]
            runs.append({"seed": seed, "dense": found.dense.accuracy, "last": last, "points": points})
            ranks += [
                {"seed": seed, "sparsity": s, "spearman": prediction(model, data, s, repair, seed)}
                for s in given.sparsities
            ]
        content[repair] = {"runs": runs, "prediction": ranks, "medians": report(name, repair, runs, ranks)}
    return content


def report(name: str, repair: str, runs: list[Any], ranks: list[Any]) -> dict[str, dict[str, float]]:
    """Prints the medians over seeds, and returns top-1 by sparsity and rule."""
    points = [point for run in runs for point in run["points"]]
    medians: dict[str, dict[str, float]] = {}
    rows = []
    for s in sorted({p["sparsity"] for p in points}):
        by_rule = {
            rule: statistics.median(p["accuracy"] for p in points if (p["rule"], p["sparsity"]) == (rule, s))
            for rule in RULES
            if any((p["rule"], p["sparsity"]) == (rule, s) for p in points)
        }
        medians[str(s)] = by_rule
        correlation = statistics.median(r["spearman"] for r in ranks if r["sparsity"] == s)
        best = max(by_rule, key=by_rule.__getitem__)
        tops = [f"{100 * by_rule[rule]:.1f}" if rule in by_rule else "-" for rule in RULES]
        rows.append([f"{s:.1%}", *tops, best, f"{correlation:.2f}"])
    print(f"\n{name}, repaired by {repair}; dense top-1 {100 * runs[0]['dense']:.1f} %\n")
    print(results.table(["sparsity", *RULES, "leads", "Spearman"], rows))
    for rule in RULES:
        ends = sorted(run["last"][rule] or 0.0 for run in runs)
        print(f"{rule}: keeps 95 % of the dense top-1 up to {ends[len(ends) // 2]:.1%}")
    return medians


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["resnet20", "vgg16_bn"])
    parser.add_argument("--repairs", nargs="+", choices=tuple(REPAIRS), default=list(REPAIRS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--test", type=int, default=3000, help="test images")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    given = parser.parse_args()
    content = {name: compare(name, given) for name in given.model}
    if not given.dry:
        results.write("transition", {"arguments": vars(given), "models": content})


if __name__ == "__main__":
    main()
