"""Residual blocks of ResNet-20 dropped whole: top-1 before and after repair.

    python -m benchmarks.bench_blocks [--quick]

It keeps 0.8 of its MACs on CIFAR-10, all at once and in four rounds (`steps`), by two signals, and is
repaired by ``auto``. `benchmarks/bench_axes.py` drops blocks of a language model.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import secateur as sc
from benchmarks import cifar, results
from benchmarks.resnet20 import top1, trained

RULES: dict[str, tuple[Any, int]] = {
    "output_change": (sc.Global(removal="output_change"), 1),
    "output_change, 4 rounds": (sc.Global(removal="output_change"), 4),
    "stream_change": (sc.Global(removal="stream_change"), 1),
}


def pictures(quick: bool) -> dict[str, Any]:
    """ResNet-20 on CIFAR-10."""
    model = trained()
    images, labels = cifar.load("train", 1000)
    test = cifar.load("test", 500 if quick else None)
    data = list(zip(images[:256].split(32), labels[:256].split(32), strict=True))
    dense = 100 * top1(model, *test)
    found: dict[str, Any] = {"dense": dense, "runs": []}
    lines = []
    for name, (rule, steps) in RULES.items():
        options: dict[str, Any] = {"granularity": "block", "measure_latency": False, "progress": False}
        result = sc.prune(model, data, sc.Budget(macs=0.8), rule, steps=steps, **options)
        small = sc.apply(model, result.plan)
        row = {
            "rule": name, "removed": sc.record_of(small).note,
            "macs": result.plan.predicted.macs / result.plan.dense.macs,
            "none": 100 * top1(small, *test), "auto": 100 * top1(result.model, *test),
            "repairs": [[t["method"], t["kept"]] for t in result.report.repairs],
        }  # fmt: skip
        found["runs"].append(row)
        lines.append((name, f"{row['macs']:.3f}", f"{row['none']:.2f}", f"{row['auto']:.2f}"))
    print(f"\nResNet-20 at 0.8 of its MACs, top-1 % of CIFAR-10; dense {dense:.2f}")
    print(results.table(("rule", "MACs", "pruned", "repaired"), lines))
    return found


def main() -> None:
    """Prune, print a table and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less to measure on, no result file")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found = pictures(asked.quick)
    if not asked.quick:
        results.write("blocks", found)


if __name__ == "__main__":
    main()
