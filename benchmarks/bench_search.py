"""What a search over allocations brings beside the rule that it starts from.

    python -m benchmarks.bench_search [resnet20] [smollm2]

No labels are read but to measure with. All plans are repaired by `reconstruct` with the same data.

- resnet20: channels inside the blocks at three budgets, 1,000 training images, three draws; judged on 3,000
  test images.
- smollm2: heads and neurons of SmolLM2-135M at 70 % of the parameters of its blocks, 16 texts of 256 tokens;
  perplexity on other texts. FLAP's rule has its own compensation there (`benchmarks/flap.py`).
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

import secateur as sc
from benchmarks import cifar, results
from benchmarks.bench_repair import POOL, draw, inner, spread
from benchmarks.flap import compensated
from benchmarks.resnet20 import top1, trained
from benchmarks.smollm2 import perplexity, smollm2, windows

IMAGES, SEEDS, MACS = 1000, (0, 1, 2), (0.58, 0.5, 0.3)
RULES: dict[str, Any] = {"repair_aware": sc.RepairAware(), "search": sc.Search()}
TEXTS, LENGTH, JUDGED, SHARE, TRIED = 16, 256, 40, 0.7, 16


def entry(name: str, result: sc.Result, seconds: float) -> dict[str, Any]:
    """What all cases note of a run."""
    choice, plan = result.report.selection, result.plan
    found: dict[str, Any] = {
        "rule": name,
        "macs": plan.predicted.macs / plan.dense.macs,
        "params": plan.predicted.params / plan.dense.params,
        "seconds": seconds,
        "kept": {g.name: g.kept for g in plan.groups if g.removed},
    }
    if choice is not None:
        found["tried"] = len(choice.candidates)
        found["chosen"] = choice.candidates[0].model_dump()
        found["start"] = next(c for c in choice.candidates if c.name == "repair_aware").model_dump()
    return found


def on_resnet20() -> dict[str, Any]:
    """Top-1 and processor time for every budget, draw and rule."""
    model, (images, _), test = trained(), cifar.load("train", POOL), cifar.load("test")
    rows = []
    for macs in MACS:
        for seed in SEEDS:
            data = draw(seed, IMAGES, images)
            limits = inner(sc.trace(model, data[0][0][:2]))
            for name, rule in RULES.items():
                start = time.process_time()
                result = sc.prune(
                    model, data, sc.Budget(macs=macs), rule, repair="reconstruct", limits=limits,
                    measure_latency=False, seed=seed, progress=False,
                )  # fmt: skip
                row = {"budget": macs, "seed": seed, **entry(name, result, time.process_time() - start)}
                row["top1"] = top1(result.model, *test)
                rows.append(row)
                print({k: v for k, v in row.items() if k != "kept"}, file=sys.stderr, flush=True)
    return {"dense": top1(model, *test), "images": IMAGES, "runs": rows}


def resnet20_table(found: dict[str, Any]) -> str:
    """A row for each budget and rule: means over draws."""

    def cells(macs: float, rule: str) -> Sequence[Any]:
        mine = [r for r in found["runs"] if (r["budget"], r["rule"]) == (macs, rule)]
        seconds = statistics.mean(r["seconds"] for r in mine)
        held = [r["chosen"]["errors"][-1] / r["start"]["errors"][-1] for r in mine if "chosen" in r]
        distance = f"{statistics.mean(held):.2f}" if held else ""
        return macs, rule, spread([r["top1"] for r in mine]), distance, f"{seconds:.0f}"

    budgets = dict.fromkeys(r["budget"] for r in found["runs"])
    titles = ("MACs", "rule", "top-1", "held-out distance, start = 1", "seconds")
    return results.table(titles, [cells(macs, rule) for macs in budgets for rule in RULES])


def on_smollm2() -> dict[str, Any]:
    """Perplexity and processor time for every rule."""
    model, tokenizer = smollm2()
    ids = windows(tokenizer, LENGTH)[:TEXTS]
    judged = windows(tokenizer, LENGTH, second=True)[:JUDGED]
    data = [text[None] for text in ids]
    every = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for name, p in model.named_parameters() if "layers." in name)
    budget = sc.Budget(params=every - round((1 - SHARE) * blocks))
    rows = []
    cases = {
        "flap": sc.Global(removal="fluctuation", normalise="zscore"),
        "repair_aware": sc.RepairAware(per="params"),
        "search": sc.Search(evaluations=TRIED, starts={"repair_aware": sc.RepairAware(per="params")}),
    }
    for name, rule in cases.items():
        start = time.process_time()
        result = sc.prune(
            model, data, budget, rule, repair=None if name == "flap" else "reconstruct",
            measure_latency=False, progress=False,
        )  # fmt: skip
        small = result.model
        if name == "flap":
            small = compensated(small, model, result.graph, result.plan, data)
        row = {**entry(name, result, time.process_time() - start), "perplexity": perplexity(small, judged)}
        rows.append(row)
        print({k: v for k, v in row.items() if k != "kept"}, file=sys.stderr, flush=True)
    return {
        "dense": perplexity(model, judged), "texts": TEXTS, "tokens": LENGTH, "share": SHARE, "runs": rows,
    }  # fmt: skip


def main() -> None:
    """Runs the cases named on the command line, or both, and writes the result file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    content = {k: v for k, v in (results.read("search") or {}).items() if k != "environment"}
    for name in sys.argv[1:] or ["resnet20", "smollm2"]:
        if name == "resnet20":
            content[name] = on_resnet20()
            print(f"dense {100 * content[name]['dense']:.1f}\n{resnet20_table(content[name])}")
        else:
            content[name] = on_smollm2()
            rows = [
                (r["rule"], f"{r['perplexity']:.1f}", f"{r['seconds']:.0f}") for r in content[name]["runs"]
            ]
            print(f"dense {content[name]['dense']:.1f}")
            print(results.table(("rule", "perplexity", "seconds"), rows))
        results.write("search", content)


if __name__ == "__main__":
    main()
