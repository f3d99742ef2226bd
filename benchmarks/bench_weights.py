"""Which weights go, and how many of each layer, at equal sparsity.

    python -m benchmarks.bench_weights [--model resnet20 llama] [--sparsities ...] [--seeds N] [--quick]
    python -m benchmarks.bench_weights --block

Top-1 of ResNet-20 and perplexity of a small Llama: criteria by rules, each with the budget solved for the
sparsity, with and without repair; beside them EMP at β = 1, whose sparsity nobody chooses. The repair is
``variance`` for ResNet-20 and the second-order update of linear layers for the language model. Seeds choose
the calibration data. Every run and the medians go to `benchmarks/results/weights_<model>.json`, which is
written anew after each seed. EMP over the whole model keeps the highest scores of all, as global ranking
does. Data: see `benchmarks/cifar.py`; the language model is that of `benchmarks/small_language_model.py`.

``--block`` masks one layer of a 7-billion-parameter Llama, 4096 inputs and 11008 outputs, and prints the peak
of the memory and the seconds of each step (`benchmarks/results/weights_block.json`).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.characters import perplexity, text, windows
from benchmarks.resnet20 import trained as trained_resnet20
from benchmarks.small_language_model import trained as trained_llama
from secateur.allocators import EMP, ERK, LAMP, OWL, Budget, Repairability, Uniform
from secateur.repairs.sweep import sweep
from secateur.targets import weights as masks
from secateur.targets.weights.distortion import with_curves

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
CRITERIA = ("magnitude", "wanda", "taylor")
RULES: dict[str, Callable[[str], Any]] = {
    "uniform": lambda c: Uniform(removal=c),
    "emp layer": lambda c: EMP(removal=c),
    "emp model": lambda c: EMP(scope="model", removal=c),
    "emp row": lambda c: EMP(scope="row", removal=c),
    "erk": lambda c: ERK(removal=c),
    "lamp": lambda c: LAMP(removal=c),
    "owl": lambda c: OWL(removal=c),
    "repairability": lambda c: Repairability(removal=c),
}


@dataclass(frozen=True)
class Case:
    """A trained model and how it is measured.

    Attributes:
        model: In evaluation mode.
        calibration: seed -> batches.
        measure: What is printed: top-1 in percent, or perplexity.
        repair: (masked model, dense model, plan, batches), in place.
        graph: The trace, where the repair needs it.
    """

    model: nn.Module
    calibration: Callable[[int], list[Any]]
    measure: Callable[[nn.Module], float]
    repair: Callable[[nn.Module, nn.Module, masks.MaskPlan, list[Any]], object]
    graph: sc.Graph | None = None


def resnet20(images: int, judged: int) -> Case:
    """ResNet-20 on CIFAR-10."""
    model = trained_resnet20()
    graph = sc.trace(model, torch.zeros(2, 3, 32, 32))
    x, y = cifar.load("train", 8 * images)
    test = list(zip(*(t.split(250) for t in cifar.load("test", judged)), strict=True))

    def batches(seed: int) -> list[Any]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:images]
        return [(x[k], y[k]) for k in order.split(64)]

    def repair(small: nn.Module, dense: nn.Module, plan: masks.MaskPlan, data: list[Any]) -> object:
        return sweep("variance", small, graph, sc.Calibration.of(data))

    def measure(m: nn.Module) -> float:
        return 100 * float(sc.evaluate(m, test).accuracy or 0.0)

    return Case(model, batches, measure, repair, graph)


def llama(images: int, judged: int) -> Case:
    """A small Llama, by characters; a stretch of text stands for four images."""
    model = trained_llama()
    train, test, _ = text()

    def batches(seed: int) -> list[Any]:
        ids = windows(train, max(8, images // 4), 10**6 + seed)
        return [{"input_ids": part, "labels": part} for part in ids.split(16)]

    return Case(
        model,
        batches,
        lambda m: perplexity(m, test, max(8, judged // 8)),
        lambda small, dense, plan, data: masks.surgeon(small, dense, plan, data),
    )


CASES: dict[str, Callable[[int, int], Case]] = {"resnet20": resnet20, "llama": llama}


class Runs:
    """The runs of one case; what repeats is computed once."""

    def __init__(self, case: Case) -> None:
        """Nothing has run."""
        self.case, self.done = case, list[dict[str, Any]]()
        self._pruned: dict[bytes, float] = {}

    def seed(
        self,
        seed: int,
        criteria: Sequence[str],
        wanted: Sequence[tuple[float | None, str]],
    ) -> None:
        """Every criterion, and every rule at every sparsity; None: the rule decides."""
        case, data = self.case, self.case.calibration(seed)
        weights = sc.trace(case.model, granularity="weight")
        scores = sc.score(weights, data, criteria, seed=seed, progress=False)
        for criterion in criteria:
            rules: dict[str, Any] = {}
            for sparsity, name in wanted:
                if name not in rules:  # curves are measured once
                    rules[name] = with_curves(RULES[name](criterion), case.model, data, scores)
                budget = None if sparsity is None else Budget(sparsity=sparsity)
                plan = rules[name].allocate(weights, scores, budget, seed=seed)
                self._run(plan, data, {"criterion": criterion, "rule": name, "asked": sparsity, "seed": seed})

    def _run(self, plan: masks.MaskPlan, data: list[Any], line: dict[str, Any]) -> None:
        small = sc.apply(self.case.model, plan, graph=self.case.graph)
        key = b"".join(mask.tobytes() for mask in plan.masks.values())
        if key not in self._pruned:
            self._pruned[key] = self.case.measure(small)
        self.case.repair(small, self.case.model, plan, data)
        found = {"sparsity": plan.sparsity, "pruned": self._pruned[key], "repaired": self.case.measure(small)}
        self.done.append(line | found)


def medians_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds."""
    keys = list(dict.fromkeys((r["asked"], r["criterion"], r["rule"]) for r in runs))
    medians = []
    for asked, criterion, rule in keys:
        same = [r for r in runs if (r["asked"], r["criterion"], r["rule"]) == (asked, criterion, rule)]
        middle = {k: statistics.median(r[k] for r in same) for k in ("sparsity", "pruned", "repaired")}
        medians.append({"asked": asked, "criterion": criterion, "rule": rule, **middle})
    return sorted(medians, key=lambda m: m["asked"] or 2.0)


def report(name: str, dense: float, medians: Sequence[dict[str, Any]]) -> None:
    """Prints the medians over seeds."""
    rows = [
        [
            "β = 1" if m["asked"] is None else f"{m['asked']:.0%}",
            m["criterion"],
            m["rule"],
            f"{100 * m['sparsity']:.1f}",
            f"{m['pruned']:.2f}",
            f"{m['repaired']:.2f}",
        ]
        for m in medians
    ]
    print(f"\n{name}: dense {dense:.2f}\n")
    print(results.table(["asked", "criterion", "rule", "zero %", "pruned", "repaired"], rows))


def compare(name: str, given: argparse.Namespace) -> None:
    """One model, all seeds."""
    case = CASES[name](given.images, given.test)
    dense, runs = case.measure(case.model), Runs(case)
    wanted: list[tuple[float | None, str]] = [(s, r) for s in given.sparsities for r in given.rules]
    wanted += [(None, r) for r in given.rules if r.startswith("emp")]
    for seed in range(given.seeds):
        runs.seed(seed, given.criteria, wanted)
        medians = medians_of(runs.done)
        content = {"arguments": vars(given), "seeds": seed + 1, "dense": dense, "medians": medians}
        if not given.dry:
            results.write(f"weights_{name}", content | {"runs": runs.done})
    report(name, dense, medians)


def block(given: argparse.Namespace) -> None:
    """Masks a layer of 4096 inputs and 11008 outputs."""
    model = nn.Linear(4096, 11008, bias=False)
    data = [torch.randn(512, 4096, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    steps: list[dict[str, Any]] = []
    start = time.perf_counter()

    def note(step: str) -> None:
        # Kilobytes on Linux, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        steps.append({"step": step, "peak_gb": peak / 1e9, "seconds": time.perf_counter() - start})

    note("model")
    weights = sc.trace(model, granularity="weight")
    scores = sc.score(weights, data, "wanda", progress=False)
    note("wanda")
    plan = Uniform(removal="wanda").allocate(weights, scores, Budget(sparsity=0.5))
    note("uniform, 50 %")
    sc.verify(model, sc.apply(model, plan), plan)
    note("applied and checked")
    del plan
    plan = masks.Pattern(removal="wanda").allocate(weights, scores)
    sc.verify(model, sc.apply(model, plan), plan)
    note("2:4, applied and checked")
    rows = [[s["step"], f"{s['peak_gb']:.2f}", f"{s['seconds']:.1f}"] for s in steps]
    print(results.table(["after", "peak GB", "seconds"], rows))
    if not given.dry:
        results.write("weights_block", {"arguments": vars(given), "steps": steps})


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=list(RULES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    parser.add_argument("--quick", action="store_true", help="one seed, two sparsities, little data; dry")
    parser.add_argument("--block", action="store_true", help="mask one layer of a large model instead")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.sparsities, given.images, given.test, given.dry = 1, [0.5, 0.8], 64, 200, True
    if given.block:
        block(given)
        return
    for name in given.model:
        compare(name, given)


if __name__ == "__main__":
    main()
