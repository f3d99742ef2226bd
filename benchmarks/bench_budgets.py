"""Whether budgets hold: drops of accuracy on images that the run never saw, and memory of a process.

    python -m benchmarks.bench_budgets [drops] [memory] [--draws 0 1 2]

- drops: ResNet-20, channels inside the blocks, `RepairAware`, every layer refitted. For each draw 500
  training images to score and repair with, 5,000 others held out, budgets of 1 and 3 points. The pruned
  models are then measured on 3,000 test images. Beside each the cheapest plan of the same draw that meets
  the budget there, of plans at every 2.5 % of the MACs, which only somebody who knows the test data could
  choose. Draws are added to those in the result file. A draw takes about four minutes on one core.
- memory: what `secateur.measure.memory` counts, beside what a fresh process grows by (Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.bench_repair import inner
from benchmarks.resnet20 import top1, trained
from secateur.measure.memory import memory

IMAGES, HELD, POOL = 500, 5000, 20_000
DROPS = (0.01, 0.03)
GRID = tuple(round(0.85 - 0.025 * k, 3) for k in range(12))


def drops(seeds: list[int]) -> dict[str, Any]:
    """A row for each draw and budget."""
    known = (results.read("budgets") or {}).get("drops", {}).get("runs", [])
    runs = [r for r in known if r["seed"] not in seeds]
    model, (images, labels), test = trained(), cifar.load("train", POOL), cifar.load("test")
    dense = top1(model, *test)
    whole = torch.utils.data.TensorDataset(*test)
    for seed in seeds:
        chosen = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))
        data, held = (
            [(images[c], labels[c]) for c in part.split(size)]
            for part, size in ((chosen[:IMAGES], 100), (chosen[IMAGES : IMAGES + HELD], 250))
        )
        asked: dict[str, Any] = {
            "repair": "reconstruct", "limits": inner(sc.trace(model, data[0][0][:2])), "seed": seed,
            "evaluation": data[:1], "measure_latency": False, "progress": False,
        }  # fmt: skip
        known_test = sc.prune(
            model, data, sc.Budget(macs=0.9), "repair_aware", frontier=GRID,
            held_out=torch.utils.data.DataLoader(whole, 250), **asked,
        ).frontier  # fmt: skip
        grid = [(point.macs, point.damage) for point in known_test.points]
        for drop in DROPS:
            start = time.process_time()
            result = sc.prune(
                model, data, sc.Budget(accuracy_drop=drop), "repair_aware", held_out=held, **asked
            )
            plan, met = result.plan, result.plan.settings["met"]
            row = {
                "seed": seed, "drop": drop, "macs": plan.predicted.macs / plan.dense.macs,
                "held_out": met["accuracy_drop"], "looks": met["plans_measured"],
                "test_drop": dense - top1(result.model, *test),
                "cheapest": min(macs for macs, found in grid if found <= drop),
                "seconds": time.process_time() - start,
            }  # fmt: skip
            runs.append(row)
            print(row, file=sys.stderr, flush=True)
        runs[-1]["grid"] = grid
    return {
        "dense": dense, "images": IMAGES, "held_out": HELD, "test": len(test[0]),
        "runs": sorted(runs, key=lambda r: (r["drop"], r["seed"])),
    }  # fmt: skip


def drops_table(found: dict[str, Any]) -> str:
    """A row for each budget."""

    def cells(drop: float) -> list[Any]:
        mine = [r for r in found["runs"] if r["drop"] == drop]
        met = sum(r["test_drop"] <= drop for r in mine)
        excess = [r["macs"] / r["cheapest"] - 1 for r in mine]
        return [
            f"{100 * drop:g} points",
            f"{met} of {len(mine)}",
            " to ".join(f"{100 * f(r['test_drop'] for r in mine):.1f}" for f in (min, max)),
            f"{statistics.mean(r['macs'] for r in mine):.3f}",
            f"{statistics.mean(r['cheapest'] for r in mine):.3f}",
            f"{100 * statistics.median(excess):+.1f} %",
            " to ".join(f"{100 * f(excess):+.1f}" for f in (min, max)),
            f"{statistics.mean(r['looks'] for r in mine):.1f}",
            f"{statistics.mean(r['seconds'] for r in mine):.0f}",
        ]

    titles = (
        "budget",
        "met on test",
        "test drop",
        "MACs",
        "cheapest",
        "median",
        "more than it",
        "looks",
        "seconds",
    )
    return results.table(titles, [cells(drop) for drop in DROPS])


def cases() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Networks and inputs whose activations take hundreds of megabytes."""
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(), nn.Conv2d(64, 8, 3, padding=1),
    )  # fmt: skip
    mlp = nn.Sequential(
        nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 8192), nn.GELU(), nn.Linear(8192, 9)
    )
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return {
        "convolutions": (conv, torch.randn(16, 3, 224, 224)),
        "fully connected": (mlp, torch.randn(2048, 1024)),
        "transformer": (
            nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            torch.randn(16, 512, 512),
        ),
    }


def pruned(name: str, half: bool) -> tuple[nn.Module, torch.Tensor]:
    """A network of `cases`, dense or with half of its MACs."""
    model, x = cases()[name]
    model.eval()
    if half:
        graph = sc.trace(model, x[:2])
        scores = sc.score(graph, None, "magnitude", progress=False)
        model = sc.apply(model, sc.Uniform().allocate(graph, scores, sc.Budget(macs=0.5)), graph=graph)
    return model, x


def child(name: str, half: bool) -> None:
    """Prints by how many bytes this process grows at its peak in a forward pass."""
    model, x = pruned(name, half)
    with torch.no_grad():
        model(x[:1])  # what the first call allocates for good

        def status(field: str) -> int:
            with open("/proc/self/status", encoding="ascii") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        before = status("VmRSS")
        model(x)
        print(status("VmHWM") - before)


def memories() -> list[dict[str, Any]]:
    """A row for each network: counted, and measured in a process of its own."""
    rows = []
    for name in cases():
        for half in (False, True):
            model, x = pruned(name, half)
            counted = memory(model, (x,))
            grown = subprocess.run(
                [sys.executable, "-m", __spec__.name, "child", "--case", name, *["--half"] * half],
                env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
                capture_output=True, text=True, check=True,
            ).stdout.split()[-1]  # fmt: skip
            measured = int(grown) + x.nbytes + counted.weights  # which were there before
            rows.append(
                {
                    "network": name, "pruned": half, "counted": counted.total, "measured": measured,
                    "weights": counted.weights, "off": counted.total / measured - 1,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Runs the cases named on the command line, or all, and writes the result file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=["drops", "memory"])
    parser.add_argument("--draws", type=int, nargs="*", default=[*range(10)])
    parser.add_argument("--case")
    parser.add_argument("--half", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if asked.names == ["child"]:
        return child(asked.case, asked.half)
    for name in asked.names:
        content = {k: v for k, v in (results.read("budgets") or {}).items() if k != "environment"}
        if name == "drops":
            for seed in asked.draws:
                content[name] = drops([seed])
                results.write("budgets", content)
            print(drops_table(content[name]))
        else:
            content[name] = memories()
            results.write("budgets", content)
            rows = [
                (r["network"], "half" if r["pruned"] else "dense", f"{r['counted'] / 1e6:.1f}",
                 f"{r['measured'] / 1e6:.1f}", f"{100 * r['off']:+.1f} %") for r in content[name]
            ]  # fmt: skip
            print(results.table(("network", "", "counted, MB", "measured, MB", "off"), rows))


if __name__ == "__main__":
    main()
