"""What repair brings transformers: a small ViT and a small Llama, neurons and heads pruned in one shot.

    python -m benchmarks.bench_repair_transformers [vit] [llama] [--quick]

ToD, Uniform and RepairAware choose among the hidden neurons and the heads; the residual stream, which
layer norms mix, stays as it is. Repair sees the calibration inputs alone: no labels, and no loss. The ViT's
units are removed by U-Score (`wasserstein`), which tells classes apart; the Llama's by mean absolute
activation, since a language model has none to tell apart. ToD protects by `taylor` in both; RepairAware reads
its own signal and no labels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from benchmarks import characters, cifar, results
from benchmarks.resnet20 import top1
from benchmarks.small_language_model import trained as trained_llama
from benchmarks.small_networks import network

MACS = (0.75, 0.5)
SEEDS = (0, 1, 2)
METHODS = ("bias", "reconstruct")
IMAGES, WINDOWS = 512, 256
BATCHES = 10
POOL = 5000
"""Training images that calibration images are drawn from."""

STRETCHES = 400
"""Of the text that was held back, on which perplexity is measured."""


@dataclass(frozen=True)
class Subject:
    """A network, its data, and how well it does.

    Attributes:
        measure: ``top-1`` (%, more is better) or ``perplexity`` (a character, less is better).
        model: Dense.
        removal: The signal that both rules remove by.
        draw: Calibration batches by seed: what repair sees, and what scoring sees.
        judge: The measure of a model.
        samples: How many a draw has.
        loss_fn: As for `sc.score`.
    """

    measure: str
    model: nn.Module
    removal: str
    draw: Callable[[int], tuple[list[Any], list[Any]]]
    judge: Callable[[nn.Module], float]
    samples: int
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None


def vit(quick: bool) -> Subject:
    """The small DeiT on CIFAR-10."""
    images, labels = cifar.load("train", POOL)
    test = cifar.load("test", 500 if quick else None)

    def draw(seed: int) -> tuple[list[Any], list[Any]]:
        chosen = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:IMAGES].chunk(BATCHES)
        return [(images[c],) for c in chosen], [(images[c], labels[c]) for c in chosen]

    return Subject(
        "top-1", network("deit"), "wasserstein", draw, lambda model: 100 * top1(model, *test), IMAGES
    )


def llama(quick: bool) -> Subject:
    """The small Llama on Shakespeare."""
    train, test, _ = characters.text()

    def draw(seed: int) -> tuple[list[Any], list[Any]]:
        batches = [{"input_ids": ids} for ids in characters.windows(train, WINDOWS, seed).chunk(BATCHES)]
        return batches, batches

    def loss(model: Any, batch: Any) -> torch.Tensor:
        logits = model(**batch).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    stretches = 50 if quick else STRETCHES
    return Subject(
        "perplexity", trained_llama(), "activation", draw,
        lambda model: characters.perplexity(model, test, stretches), WINDOWS, loss,
    )  # fmt: skip


SUBJECTS: dict[str, Callable[[bool], Subject]] = {"vit": vit, "llama": llama}


def compare(name: str, subject: Subject, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The measure for every seed, budget, rule and repair."""
    found = []
    for seed in seeds:
        data, scored = subject.draw(seed)
        example = sc.Calibration.of(data).first()
        graph = sc.trace(subject.model, example.kwargs or example.args)
        signals = (subject.removal, "taylor", "reconstruction")
        scores = sc.score(graph, scored, signals, loss_fn=subject.loss_fn, seed=seed, progress=False)
        for budget in MACS:
            for rule in (
                sc.ToD(removal=subject.removal),
                sc.Uniform(removal=subject.removal),
                sc.RepairAware(),
            ):
                plan = rule.allocate(graph, scores, sc.Budget(macs=budget), seed=seed)
                small = sc.apply(subject.model, plan, graph=graph)
                row: dict[str, Any] = {
                    "network": name, "seed": seed, "budget": budget, "allocator": rule.name,
                    "macs": plan.predicted.macs / plan.dense.macs,
                    "params": plan.predicted.params / plan.dense.params,
                    "kept": {g.name: [g.kept, g.size] for g in plan.groups},
                    "none": subject.judge(small),
                }  # fmt: skip
                for method in METHODS:
                    start = time.perf_counter()
                    repaired = sc.repair(
                        small, subject.model, data, method, graph=graph, seed=seed, progress=False
                    )
                    row[f"{method} seconds"] = time.perf_counter() - start
                    row[method] = subject.judge(repaired)
                    kept = [t["method"] for t in sc.record_of(repaired).repairs if t["kept"]]
                    row[f"{method} kept"] = kept
                found.append(row)
                shown = {k: row[k] for k in ("seed", "budget", "allocator", "none", *METHODS)}
                print(f"{name}: {shown}", file=sys.stderr, flush=True)
    return found


def summary(rows: Sequence[dict[str, Any]], dense: float) -> list[tuple[Any, ...]]:
    """A row for each budget and rule: mean and standard deviation over seeds."""
    lines = []
    for case in dict.fromkeys((r["budget"], r["allocator"]) for r in rows):
        mine = [r for r in rows if (r["budget"], r["allocator"]) == case]
        cells = []
        for stage in ("none", *METHODS):
            values = [r[stage] for r in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        macs = statistics.mean(r["macs"] for r in mine)
        lines.append((*case, f"{macs:.4f}", f"{dense:.2f}", *cells))
    return lines


def main() -> None:
    """Runs the networks named on the command line, or both, and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="network", help=", ".join(SUBJECTS))
    parser.add_argument("--quick", action="store_true", help="one seed, less to measure on, no result file")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in asked.networks or SUBJECTS:
        subject = SUBJECTS[name](asked.quick)
        dense = subject.judge(subject.model)
        rows = compare(name, subject, SEEDS[: 1 if asked.quick else None])
        size = sum(p.numel() for p in subject.model.parameters())
        print(
            f"\n{name}, {size} parameters, {subject.measure}, mean ± standard deviation over calibration "
            f"seeds; {subject.samples} calibration samples; removal by {subject.removal}"
        )
        print(results.table(("budget", "rule", "MACs", "dense", "none", *METHODS), summary(rows, dense)))
        found[name] = {
            "measure": subject.measure, "dense": dense, "parameters": size, "removal": subject.removal,
            "samples": subject.samples, "runs": rows,
        }  # fmt: skip
    if not asked.quick and not asked.networks:
        results.write("repair_transformers", found)


if __name__ == "__main__":
    main()
