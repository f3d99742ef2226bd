"""Real speed-up of pruned networks: ResNet-20 at half of its MACs, in three back ends, with intervals.

python -m benchmarks.bench_latency            # ResNet-20 at 50 % of the MACs, batch 32 and batch 1
python -m benchmarks.bench_latency --quick    # that it runs; its figures mean nothing

Dense and pruned take turns in each back end, after a warm-up; intervals are at 95 %, from paired rounds.
Weights decide neither shapes nor times here, so no data is needed: the rule sees the initial weights.
The target is 1.5 times at batch 32 in at least one back end.
"""

from __future__ import annotations

import argparse

import torch

import secateur as sc
from benchmarks import results
from benchmarks.resnet20 import make, trained

BUDGET = 0.5
TARGET = 1.5
BACKENDS = ("eager", "compile", "onnxruntime")


def plans(model: torch.nn.Module, images: torch.Tensor) -> dict[str, sc.Plan]:
    """The same rule at the same budget, with any number of channels and with multiples of eight."""
    graph = sc.trace(model, images)
    rule = sc.Uniform(removal="magnitude")
    scores = sc.score(graph, None, rule.signals, progress=False)
    budget = sc.Budget(macs=BUDGET)
    return {
        "any width": rule.allocate(graph, scores, budget),
        "multiples of 8": rule.allocate(graph, scores, budget, sc.Limits(round_to=8)),
    }


def main() -> None:
    """Measures every plan, prints the tables and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and eager only")
    parser.add_argument("--trained", action="store_true", help="the trained weights, if the data is there")
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = trained() if asked.trained else make()
    images = torch.randn(32, 3, 32, 32)
    runs = []
    for name, plan in plans(model, images).items():
        small = sc.apply(model, plan, example_inputs=images)
        found = sc.bench(
            model,
            small,
            images,
            backends=BACKENDS[:1] if asked.quick else BACKENDS,
            batches=(4,) if asked.quick else (1, 32),
            rounds=5 if asked.quick else asked.rounds,
        )
        share = plan.predicted.macs / plan.dense.macs
        print(f"\nResNet-20, {name}: {share:.1%} of the MACs, {plan.predicted.params:,} parameters\n{found}")
        runs.append({"plan": name, "macs": share, "params": plan.predicted.params, **found.to_dict()})
    rows = [
        row for run in runs for row in run["rows"] if row["batch"] == max(r["batch"] for r in run["rows"])
    ]
    best = max(rows, key=lambda row: row["speedup"]["low"])
    print(
        f"\nmost certain at the largest batch: {best['speedup']['value']:.2f} times in {best['backend']} "
        f"({best['speedup']['low']:.2f} to {best['speedup']['high']:.2f}); target {TARGET}"
    )
    if asked.quick:
        print("--quick: not written")
        return
    results.write("latency", {"network": "ResNet-20", "budget": BUDGET, "target": TARGET, "runs": runs})


if __name__ == "__main__":
    main()
