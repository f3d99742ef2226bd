"""What repair brings: ResNet-20 pruned in one shot, without labels and without training.

    python -m benchmarks.bench_repair [accuracy] [images] [peer] [cost]

Each part has a result file of its own.

- accuracy: two ways to choose the units at four budgets, over seeds, and every method alone at one of them.
- images: accuracy against the number of calibration images.
- peer: Torch-Pruning's criteria at the same budgets, with and without batch-norm re-estimation.
- cost: seconds and memory of repair, against one forward pass; one large linear layer.

Calibration images are training images; labels only judge on held-out ones, and only in `auto`.
"""

from __future__ import annotations

import copy
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.resnet20 import ResNet20, top1, trained
from secateur.repairs.batchnorm import reestimate
from secateur.repairs.regression.leastsquares import Sums, fit

MACS = (0.8, 0.68, 0.58, 0.5)
TARGETS = {0.8: 0.865, 0.68: 0.845, 0.58: 0.815, 0.5: 0.77}
SEEDS = (0, 1, 2, 3, 4)
IMAGES = 1000
COUNTS = (8, 32, 128, 500, 1000, 2000)
METHODS: tuple[Any, ...] = (
    "batchnorm", "bias", "layerwise", "variance", ("variance", "batchnorm"), "reconstruct",
    ("reconstruct", "batchnorm"), "auto",
)  # fmt: skip
BASIC = ("batchnorm", "reconstruct")
ABLATION = 0.58
"""The share of the MACs at which every method is tried."""

POOL = 5000
"""Training images that calibration images are drawn from."""

Batches = list[tuple[Tensor, ...]]


def draw(seed: int, count: int, images: Tensor, labels: Tensor | None = None) -> Batches:
    """`count` training images in batches of at most 100, another draw for each seed."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    parts = chosen.split(min(100, max(1, count // 5)))
    return [(images[c],) if labels is None else (images[c], labels[c]) for c in parts]


def inner(graph: sc.Graph) -> sc.Limits:
    """Prune inside the blocks; the residual streams keep their width."""
    names = [g.name for g in graph.groups if not (g.name.startswith("layer") and g.name.endswith("conv1"))]
    return sc.Limits(ignore=tuple(names))


RULES: dict[str, sc.Allocator] = {
    "repair-aware": sc.RepairAware(),
    "uniform, magnitude x wasserstein": sc.Uniform(removal="magnitude*wasserstein"),
}
"""Ways to choose the units. The first reads no labels."""


def plans(graph: sc.Graph, data: Batches, labelled: Batches, seed: int) -> dict[str, Callable[..., sc.Plan]]:
    """For each rule: share of the MACs -> plan; all channels, or those inside the blocks."""
    table = {
        "repair-aware": sc.score(graph, data, "reconstruction", seed=seed, progress=False),
        "uniform, magnitude x wasserstein": sc.score(
            graph, labelled, ("magnitude", "wasserstein"), seed=seed, progress=False
        ),
    }

    def plan(name: str) -> Callable[..., sc.Plan]:
        def made(macs: float, scope: str = "inner") -> sc.Plan:
            limits = inner(graph) if scope == "inner" else sc.Limits()
            return RULES[name].allocate(graph, table[name], sc.Budget(macs=macs), limits, seed)

        return made

    return {name: plan(name) for name in RULES}


def accuracy(
    model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seeds: Sequence[int] = SEEDS
) -> list[dict[str, Any]]:
    """Top-1 for every seed, way to choose, scope, budget and method; every method at one budget."""
    found = []
    for seed in seeds:
        data, labelled = draw(seed, IMAGES, train[0]), draw(seed, IMAGES, *train)
        graph = sc.trace(model, data[0][0][:2])
        made = plans(graph, data, labelled, seed)
        first = next(iter(made))
        cases = [(name, "inner", macs) for name in made for macs in MACS]
        cases += [(first, "all", macs) for macs in MACS]
        for name, scope, macs in cases:
            plan = made[name](macs, scope)
            small = sc.apply(model, plan, graph=graph)
            row = {
                "seed": seed, "plan": name, "scope": scope, "budget": macs,
                "macs": plan.predicted.macs / plan.dense.macs,
                "params": plan.predicted.params / plan.dense.params,
                "kept": {g.name: g.kept for g in plan.groups}, "none": top1(small, *test),
            }  # fmt: skip
            every = (name, scope, macs) == (first, "inner", ABLATION)
            for method in METHODS if every else BASIC:
                repaired = sc.repair(small, model, data, method, graph=graph, seed=seed, progress=False)
                title = method if isinstance(method, str) else " + ".join(method)
                row[title] = top1(repaired, *test)
                if method == "auto":
                    kept = [t["method"] for t in sc.record_of(repaired).repairs if t["kept"]]
                    row["auto chose"] = kept[0] if kept else "nothing"
            found.append(row)
            shown = {k: v for k, v in row.items() if k != "kept"}
            print(shown, file=sys.stderr, flush=True)
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in points."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def accuracy_tables(rows: list[dict[str, Any]], dense: float) -> str:
    """Means over seeds; then every method at one budget."""
    lines = []
    for name, scope in dict.fromkeys((r["plan"], r["scope"]) for r in rows):
        for macs in MACS:
            mine = [r for r in rows if (r["plan"], r["scope"], r["budget"]) == (name, scope, macs)]
            cells = [spread([r[title] for r in mine]) for title in ("none", *BASIC)]
            lines.append((name, scope, f"{macs:.2f}", *cells, f"{100 * TARGETS[macs]:.1f}"))
    first = rows[0]["plan"]
    one = [r for r in rows if (r["plan"], r["scope"], r["budget"]) == (first, "inner", ABLATION)]
    titles = ["none", *(m if isinstance(m, str) else " + ".join(m) for m in METHODS)]
    return (
        f"dense {100 * dense:.1f}\n"
        + results.table(("plan", "channels", "MACs", "none", *BASIC, "target"), lines)
        + f"\n\neach method alone, at {ABLATION} of the MACs\n"
        + results.table(("method", "top-1"), [(t, spread([r[t] for r in one])) for t in titles])
    )


def by_count(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    seeds: Sequence[int] = SEEDS[:3],
) -> list[dict[str, Any]]:
    """Top-1 at one budget against the number of calibration images; the plan stays the same."""
    found = []
    data, labelled = draw(0, IMAGES, train[0]), draw(0, IMAGES, *train)
    graph = sc.trace(model, data[0][0][:2])
    plan = next(iter(plans(graph, data, labelled, 0).values()))(ABLATION)
    small = sc.apply(model, plan, graph=graph)
    for count in COUNTS:
        for seed in seeds:
            row: dict[str, Any] = {"images": count, "seed": seed, "none": top1(small, *test)}
            for method in ("batchnorm", "variance", "reconstruct", "auto"):
                given = draw(100 + seed, count, train[0])
                repaired = sc.repair(small, model, given, method, graph=graph, progress=False)
                row[method] = top1(repaired, *test)
            found.append(row)
        print(f"{count} images: {found[-1]}", file=sys.stderr)
    return found


def peer(model: ResNet20, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """Torch-Pruning at the same budgets, inside the blocks, with and without batch-norm re-estimation."""
    import torch_pruning as tp

    criteria = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "taylor": tp.importance.GroupTaylorImportance,
        "batch-norm scale": tp.importance.BNScaleImportance,
        "FPGM": tp.importance.FPGMImportance,
        "LAMP": lambda: tp.importance.LAMPImportance(p=2),
    }
    data = draw(0, IMAGES, *train)
    sizes = [images[:1] for images, _ in data[:1]]
    dense, _ = tp.utils.count_ops_and_params(model, sizes[0])
    found = []
    for name, make in criteria.items():
        for everywhere in (True, False):
            for macs in MACS:
                small = _peer_pruned(tp, copy.deepcopy(model), make(), everywhere, macs * dense, data)
                row = {"criterion": name, "scope": "global" if everywhere else "uniform", "budget": macs}
                row["macs"] = tp.utils.count_ops_and_params(small, sizes[0])[0] / dense
                row["none"] = top1(small, *test)
                reestimate(small, sc.Calibration.of([(x,) for x, _ in data]))
                row["batchnorm"] = top1(small, *test)
                found.append(row)
    return found


def _peer_pruned(
    tp: Any, model: ResNet20, importance: Any, everywhere: bool, target: float, data: Batches
) -> nn.Module:
    """Pruned in small steps, down to the target."""
    streams = [
        m
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and not (n.startswith("layer") and n.endswith("conv1"))
    ]
    steps = 200
    pruner = tp.pruner.BasePruner(
        model, data[0][0][:1], importance=importance, global_pruning=everywhere, pruning_ratio=0.9,
        iterative_steps=steps, ignored_layers=streams,
    )  # fmt: skip
    for _ in range(steps):
        if isinstance(importance, tp.importance.GroupTaylorImportance):
            model.zero_grad()
            for images, labels in data[:3]:
                nn.functional.cross_entropy(model(images), labels).backward()
        pruner.step()
        if tp.utils.count_ops_and_params(model, data[0][0][:1])[0] <= target:
            break
    return model.eval()


def cost(model: nn.Module, train: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Seconds of each repair and of one forward pass over the same images; memory of a large layer."""
    data = draw(0, IMAGES, train[0])
    graph = sc.trace(model, data[0][0][:2])
    scores = sc.score(graph, data, "reconstruction", progress=False)
    plan = sc.RepairAware().allocate(graph, scores, sc.Budget(macs=ABLATION), inner(graph))
    small = sc.apply(model, plan, graph=graph)
    found: dict[str, Any] = {}

    def forward() -> None:
        with torch.no_grad():
            for (images,) in data:
                model(images)

    steps: dict[str, Callable[[], Any]] = {"forward": forward}
    for method in ("batchnorm", "bias", "variance", "reconstruct"):
        steps[method] = lambda method=method: sc.repair(
            small, model, data, method, graph=graph, progress=False
        )
    for name, run in steps.items():
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds)
    command = [sys.executable, "-m", "benchmarks.bench_repair", "large"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds_large, bytes_large = ran.stdout.split()
    found["4096 x 11008 linear, 2048 tokens"] = {
        "seconds": float(seconds_large), "peak_bytes": int(bytes_large), "limit_bytes": 4 << 30
    }  # fmt: skip
    return found


def large() -> None:
    """Refit a linear layer, 11008 to 4096, from 2,048 tokens; prints seconds and peak bytes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 11008, 4096, generator=generator, dtype=torch.float64)
    parts: list[Sums] = []
    start = time.perf_counter()
    for k in range(8):
        x = torch.randn(1, 256, 11008, generator=generator)
        sums = Sums.of(x, x @ weight.float())
        parts = [*parts, sums] if k < 2 else [*parts[: k % 2], parts[k % 2] + sums, *parts[k % 2 + 1 :]]
    fit(parts, weight, None, False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(time.perf_counter() - start, peak)


def main() -> None:
    """Runs the parts named on the command line, or all, and writes the result file."""
    if sys.argv[1:] == ["large"]:
        large()
        return
    warnings.simplefilter("ignore")
    asked = sys.argv[1:] or ["accuracy", "images", "peer", "cost"]
    model = trained()
    train, test = cifar.load("train", POOL), cifar.load("test")
    dense = top1(model, *test)
    about = {"dense": dense, "images": IMAGES, "targets": {str(k): v for k, v in TARGETS.items()}}
    if "accuracy" in asked:
        rows = accuracy(model, train, test)
        print(accuracy_tables(rows, dense))
        results.write("repair_accuracy", {**about, "runs": rows})
    if "images" in asked:
        runs = by_count(model, train, test)
        methods = ("none", "batchnorm", "variance", "reconstruct", "auto")
        lines = [(n, *(spread([r[m] for r in runs if r["images"] == n]) for m in methods)) for n in COUNTS]
        print(f"\n{ABLATION} of the MACs, by number of calibration images")
        print(results.table(("images", *methods), lines))
        results.write("repair_images", {**about, "runs": runs})
    if "peer" in asked:
        runs = peer(model, train, test)
        lines = [
            (r["criterion"], r["scope"], f"{r['budget']:.2f}", f"{r['macs']:.3f}", f"{100 * r['none']:.1f}",
             f"{100 * r['batchnorm']:.1f}")
            for r in runs
        ]  # fmt: skip
        print("\nTorch-Pruning")
        print(results.table(("criterion", "scope", "budget", "MACs", "none", "batchnorm"), lines))
        results.write("repair_peer", {**about, "runs": runs})
    if "cost" in asked:
        seconds = cost(model, train)
        print(f"\nseconds for {IMAGES} images: {seconds}")
        results.write("repair_cost", {"images": IMAGES, "cost": seconds})


if __name__ == "__main__":
    main()
