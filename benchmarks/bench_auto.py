"""``allocator="auto"``: what it chooses, what it costs, and what rounds bring.

    python -m benchmarks.bench_auto ranking [--networks resnet20 densenet deit] [--share 0.5] [--seeds N]
    python -m benchmarks.bench_auto cost [--threads N]
    python -m benchmarks.bench_auto rounds [--seeds N]
    python -m benchmarks.bench_auto weights experts [--seeds N]

- ranking: every candidate of `sc.Auto` at one budget, refitted on part and on all of the calibration data.
  How well the held-out loss on labels and the held-out distance to the dense model's outputs, each on 200
  samples, rank the candidates' top-1 on the test images: Spearman's correlation. And what `auto` chose.
- cost: processor seconds and wall seconds from the call to the verified and repaired ResNet-20, 1,000 images.
- rounds: ``steps`` of 1, 2 and 4 for the repair-aware rule and ToD, ResNet-20 and DeiT, top-1.
- weights, experts: `auto` for single weights of ResNet-20 (top-1) and for experts of the small Qwen2-MoE
  (perplexity a character), beside each of its candidates alone, in the same call of `sc.prune`.

Each part goes to `benchmarks/results/auto_<part>.json`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.bench_repair import draw
from benchmarks.characters import perplexity, text
from benchmarks.moe_language_model import batches, library, trained
from benchmarks.resnet20 import top1
from benchmarks.small_networks import network
from secateur.allocators.unit_distortions import with_unit_curves
from secateur.calibration import Calibration
from secateur.calibration.subset import take_share
from secateur.measure.evaluate import evaluate
from secateur.pipeline.auto.choose import FEW, MORE
from secateur.pipeline.targets.experts import Experts
from secateur.pipeline.targets.weights import SingleWeights
from secateur.repairs.batchnorm import batch_norms, reestimate
from secateur.repairs.judging import Judge
from secateur.repairs.sweep import sweep

PARTS = ("ranking", "cost", "rounds", "weights", "experts")
IMAGES = 1000
STRETCHES, BATCHES = 160, 5
"""Of 128 characters: test text, and batches of 32 to calibrate on."""
STAGES = ("batchnorm, 1/16", "reconstruct, 1/16", "reconstruct, 1/4", "reconstruct, all")


def ranking(
    name: str, seed: int, share: float, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> list[dict[str, Any]]:
    """A row for each candidate: how it measures at each stage, and its top-1."""
    model = network(name).eval()
    fit, held = Calibration.of(draw(seed, IMAGES, *train)).split()
    graph = sc.trace(model, fit.first().args[0][:2])
    rules = sc.Auto().rules
    scores = sc.score(graph, fit, [s for r in rules.values() for s in r.signals], progress=False)
    judge = Judge(model, held)
    parts = {"1/16": take_share(fit, FEW), "1/4": take_share(fit, MORE), "all": fit}
    rows = []
    for candidate, rule in rules.items():
        rule = with_unit_curves(rule, graph, parts["1/16"], scores)
        plan = rule.allocate(graph, scores, sc.Budget(macs=share))
        row: dict[str, Any] = {
            "network": name, "seed": seed, "candidate": candidate,
            "macs": plan.predicted.macs / plan.dense.macs,
        }  # fmt: skip
        small: nn.Module = model
        for stage in STAGES:
            method, part = stage.split(", ")
            small = sc.apply(model, plan, graph=graph)
            if method == "reconstruct":
                sweep("reconstruct", small, graph, parts[part])
            elif batch_norms(small):
                reestimate(small, parts[part])
            row[stage] = {
                "distance": float(judge(small).mean()),
                "loss": evaluate(small, held, dense=model).loss,
            }
        row["top1"] = top1(small.eval(), *test)
        rows.append(row)
        print(name, seed, candidate, f"{100 * row['top1']:.1f}", file=sys.stderr, flush=True)
    chosen = sc.prune(
        model, draw(seed, IMAGES, *train), sc.Budget(macs=share), repair="reconstruct", seed=seed,
        measure_latency=False, progress=False,
    )  # fmt: skip
    contest = chosen.report.selection
    assert contest is not None
    for row in rows:
        row["chosen"] = row["candidate"] == contest.candidates[0].name
    return rows


def ranking_table(rows: list[dict[str, Any]]) -> str:
    """Correlations by network, measure and stage; and what `auto` lost against the best."""
    lines = []
    for name in dict.fromkeys(r["network"] for r in rows):
        seeds = sorted({r["seed"] for r in rows if r["network"] == name})
        for measure in ("loss", "distance"):
            cells = []
            for stage in STAGES:
                found = []
                for seed in seeds:
                    mine = [r for r in rows if (r["network"], r["seed"]) == (name, seed)]
                    at = [r[stage][measure] for r in mine]
                    found.append(-float(spearmanr(at, [r["top1"] for r in mine]).statistic))
                cells.append(f"{statistics.mean(found):.2f}")
            lines.append((name, measure, *cells))
    table = results.table(("network", "held-out", *STAGES), lines)
    picks = []
    for name, seed in dict.fromkeys((r["network"], r["seed"]) for r in rows):
        mine = sorted(
            (r for r in rows if (r["network"], r["seed"]) == (name, seed)), key=lambda r: -float(r["top1"])
        )
        chosen = next(r for r in mine if r["chosen"])
        lost = 100 * (mine[0]["top1"] - chosen["top1"])
        picks.append(
            (
                name,
                seed,
                chosen["candidate"],
                f"{100 * chosen['top1']:.1f}",
                mine[0]["candidate"],
                f"{lost:.1f}",
            )
        )
    return (
        table
        + "\n\n"
        + results.table(("network", "seed", "auto chose", "top-1", "best", "points less"), picks)
    )


def cost(threads: int, train: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """Seconds of the whole call for two rules and for `auto`, three times each in turn."""
    torch.set_num_threads(threads)
    model = network("resnet20").eval()
    data = draw(0, IMAGES, *train)
    rows = []
    for turn in range(3):
        for rule in ("tod", "repair_aware", "auto"):
            wall, used = time.perf_counter(), time.process_time()
            found = sc.prune(model, data, sc.Budget(macs=0.5), rule, measure_latency=False, progress=False)
            rows.append({
                "rule": rule, "turn": turn, "threads": threads,
                "wall_seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - used,
                "phases": found.report.seconds,
            })  # fmt: skip
            print({k: v for k, v in rows[-1].items() if k != "phases"}, file=sys.stderr, flush=True)
    lines = []
    for rule in dict.fromkeys(r["rule"] for r in rows):
        of_rule = [r for r in rows if r["rule"] == rule]
        seconds = [statistics.median(r[k] for r in of_rule) for k in ("wall_seconds", "processor_seconds")]
        lines.append((rule, *(f"{s:.1f}" for s in seconds)))
    print(results.table(("rule", "wall s", "processor s"), lines))
    return rows


def rounds(seeds: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """Top-1 for each network, rule and number of rounds."""
    rows = []
    for name, share in (("resnet20", 0.5), ("deit", 0.5)):
        model = network(name).eval()
        for seed in range(seeds):
            for rule in ("repair_aware", "tod"):
                for steps in (1, 2, 4):
                    found = sc.prune(
                        model, draw(seed, IMAGES, *train), sc.Budget(macs=share), rule, repair="reconstruct",
                        steps=steps, seed=seed, measure_latency=False, progress=False,
                    )  # fmt: skip
                    rows.append({
                        "network": name, "seed": seed, "rule": rule, "steps": steps,
                        "macs": found.plan.predicted.macs / found.plan.dense.macs,
                        "top1": top1(found.model.eval(), *test),
                    })  # fmt: skip
                    print(rows[-1], file=sys.stderr, flush=True)
    lines = []
    for name, rule in dict.fromkeys((r["network"], r["rule"]) for r in rows):
        cells = []
        for steps in (1, 2, 4):
            values = [
                100 * r["top1"] for r in rows if (r["network"], r["rule"], r["steps"]) == (name, rule, steps)
            ]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        lines.append((name, rule, *cells))
    print(results.table(("network", "rule", "1 round", "2", "4"), lines))
    return rows


def weights(
    seeds: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], images: int
) -> list[dict[str, Any]]:
    """Top-1 of `auto` and of each candidate for single weights."""
    model = network("resnet20").eval()

    def pruned(rule: Any, share: float, seed: int) -> Any:
        return sc.prune(
            model, draw(seed, images, *train), sc.Budget(sparsity=share), rule, "weight",
            repair="reconstruct", seed=seed, progress=False,
        )  # fmt: skip

    rules = {name: make() for name, make in SingleWeights.candidates.items()}
    return beside(rules, (0.7, 0.9), seeds, pruned, lambda small: 100 * top1(small.eval(), *test))


def experts(seeds: int, stretches: int, count: int) -> list[dict[str, Any]]:
    """Perplexity of `auto` and of each candidate for experts."""
    library()
    model = trained()
    train, test, _ = text()

    def pruned(rule: Any, share: float, seed: int) -> Any:
        return sc.prune(
            model, batches(train, count, seed + 1), sc.Budget(experts=share), rule, "expert",
            measure_latency=False, seed=seed, progress=False,
        )  # fmt: skip

    rules = {name: make() for name, make in Experts.candidates.items()}
    return beside(rules, (0.75, 0.5), seeds, pruned, lambda small: perplexity(small, test, stretches))


def beside(
    rules: dict[str, Any],
    shares: Sequence[float],
    seeds: int,
    pruned: Callable[[Any, float, int], Any],
    measured: Callable[[nn.Module], float],
) -> list[dict[str, Any]]:
    """Every rule and `auto` at every share, by seed; printed as means."""
    rows = []
    for seed in range(seeds):
        for share in shares:
            for name, rule in {**rules, "auto": "auto"}.items():
                found = pruned(rule, share, seed)
                contest = found.report.selection
                rows.append({
                    "seed": seed, "share": share, "rule": name, "value": measured(found.model),
                    "chose": None if contest is None else contest.candidates[0].name,
                })  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    lines = []
    for name in (*rules, "auto"):
        cells = []
        for share in shares:
            values = [r["value"] for r in rows if (r["rule"], r["share"]) == (name, share)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        lines.append((name, *cells))
    print(results.table(("rule", *(f"{share:g}" for share in shares)), lines))
    return rows


def main() -> None:
    """Runs the parts that are named, and writes their result files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "densenet", "deit"])
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--test", type=int, default=2000, help="test images")
    asked = parser.parse_args()
    train, test = cifar.load("train", 5000), cifar.load("test", asked.test)
    for part in asked.parts:
        if part == "ranking":
            rows = [
                row
                for name in asked.networks
                for seed in range(asked.seeds)
                for row in ranking(name, seed, asked.share, train, test)
            ]
            print(ranking_table(rows))
        elif part == "cost":
            rows = cost(asked.threads, train)
        elif part == "rounds":
            rows = rounds(asked.seeds, train, test)
        elif part == "weights":
            rows = weights(asked.seeds, train, test, IMAGES)
        else:
            rows = experts(asked.seeds, STRETCHES, BATCHES)
        results.write(f"auto_{part}", {"images": IMAGES, "test_images": asked.test, "runs": rows})


if __name__ == "__main__":
    main()
