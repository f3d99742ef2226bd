"""What a search over allocations brings beside the rule that it starts from.

    python -m benchmarks.bench_search [depth] [resnet20] [smollm2]

No labels are read but to measure with. All plans are repaired by `reconstruct` with the same data.

- resnet20: channels inside the blocks at three budgets, 1,000 training images, three draws; judged on 3,000
  test images. depth: the same for the rules alone, without the search.
- smollm2: heads and neurons of SmolLM2-135M at shares of the parameters of its blocks, 64 texts of 256
  tokens; perplexity on other texts: FLAP's rule with its own compensation (`benchmarks/flap.py`) beside
  `RepairAware`, the start of a search, refitted, and trained from there by `polish`: one pass over 160 texts
  of the same half, the 64 among them, in steps of 2; the last 8 are held out. Rows are written as they are
  found; those of FLAP stay if the file has them for the same texts. A search there takes minutes for each
  plan, and was not measured.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

import secateur as sc
from benchmarks import cifar, results
from benchmarks.bench_repair import POOL, draw, inner, spread
from benchmarks.flap import compensated, mean_inputs
from benchmarks.resnet20 import top1, trained
from benchmarks.smollm2 import perplexity, smollm2, windows
from secateur.pipeline.targets.target import Task
from secateur.pipeline.targets.units import Units
from secateur.repairs.judging import Judge
from secateur.repairs.methods import Work

IMAGES, SEEDS, MACS = 1000, (0, 1, 2), (0.58, 0.5, 0.3)
RULES: dict[str, Any] = {"repair_aware": sc.RepairAware(), "by depth": sc.RepairAware(parts=4)}
SEARCH: dict[str, Any] = {"search": sc.Search()}
TEXTS, LENGTH, JUDGED, SHARES = 64, 256, 24, (0.8, 0.7, 0.5)
POLISHED, STEP, HELD = 160, 2, 8
POLISH = sc.Polish(passes=1, mixed=True)


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


def on_resnet20(rules: dict[str, Any]) -> dict[str, Any]:
    """Top-1 and processor time for every budget, draw and rule."""
    model, (images, _), test = trained(), cifar.load("train", POOL), cifar.load("test")
    rows = []
    for macs in MACS:
        for seed in SEEDS:
            data = draw(seed, IMAGES, images)
            limits = inner(sc.trace(model, data[0][0][:2]))
            for name, rule in rules.items():
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
    return results.table(
        titles,
        [cells(macs, rule) for macs in budgets for rule in dict.fromkeys(r["rule"] for r in found["runs"])],
    )


def on_smollm2(write: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Perplexity and processor time for every rule and share, from one trace."""
    model, tokenizer = smollm2()
    texts = windows(tokenizer, LENGTH)[:POLISHED]
    data = [text[None] for text in texts[:TEXTS]]
    judged = windows(tokenizer, LENGTH, second=True)[:JUDGED]
    every = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for name, p in model.named_parameters() if "layers." in name)
    target = Units(Task(model, sc.Calibration.of(data), repair="reconstruct"))
    found: dict[str, Any] = {
        "dense": perplexity(model, judged),
        "texts": TEXTS,
        "tokens": LENGTH,
        "polished_texts": len(texts) - HELD,
        "polish": asdict(POLISH) | asdict(POLISH.with_defaults(target.graph)),
        "runs": _of_flap(results.read("search") or {}),
    }

    def note(
        name: str, share: float, plan: sc.Plan, small: torch.nn.Module, clock: float, **more: Any
    ) -> None:
        row = {
            "rule": name,
            "share": share,
            "params": plan.predicted.params / plan.dense.params,
            "kept": {g.name: g.kept for g in plan.groups if g.removed},
            "seconds": time.process_time() - clock,
            "perplexity": perplexity(small, judged),
            **more,
        }
        found["runs"].append(row)
        print({k: v for k, v in row.items() if k != "kept"}, file=sys.stderr, flush=True)
        write(found)

    budgets = {share: sc.Budget(params=every - round((1 - share) * blocks)) for share in SHARES}
    flap = sc.Global(removal="fluctuation", normalise="zscore")
    missing = {} if found["runs"] else budgets
    if missing:
        scores, mean = target.score([flap]), mean_inputs(model, target.graph, data)
    for share, budget in missing.items():
        clock = time.process_time()
        plan = target.allocate(flap, scores, budget)
        small = compensated(target.apply(plan), model, target.graph, plan, mean)
        note("flap", share, plan, small, clock)
    ours = sc.RepairAware(per="params")
    known = target.score_candidates([ours])
    judge = Judge(model, sc.Calibration.of([text[None] for text in texts[-HELD:]]), by_scores=True)
    work = Work(lambda: target.graph, sc.Calibration.of(list(texts[:-HELD].split(STEP))), judge=judge)
    for share, budget in budgets.items():
        clock = time.process_time()
        small, plan = target.plan_and_apply(ours, known.scores, budget)
        small = target.repaired(small, plan)
        note("repair_aware", share, plan, small, clock)
        clock, before = time.process_time(), float(judge(small).mean())
        POLISH.run(small, work)
        after = float(judge(small).mean())
        note("repair_aware, polished", share, plan, small, clock, divergence=[before, after])
    return found


def _of_flap(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of FLAP that a result file has for the same texts; all shares or none."""
    known = content.get("smollm2", {})
    rows = [row for row in known.get("runs", []) if row["rule"] == "flap"]
    same = (known.get("texts"), known.get("tokens"), len(rows)) == (TEXTS, LENGTH, len(SHARES))
    return rows if same else []


def main() -> None:
    """Runs the cases named on the command line, or the last two, and writes the result file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    content = {k: v for k, v in (results.read("search") or {}).items() if k != "environment"}
    for name in sys.argv[1:] or ["resnet20", "smollm2"]:
        if name != "smollm2":
            content[name] = on_resnet20(RULES if name == "depth" else RULES | SEARCH)
            print(f"dense {100 * content[name]['dense']:.1f}\n{resnet20_table(content[name])}")
        else:
            content[name] = on_smollm2(lambda found: results.write("search", content | {"smollm2": found}))
            dense = content[name]["dense"]
            rows = [
                (r["share"], r["rule"], f"{r['perplexity']:.1f}", f"{r['perplexity'] / dense:.2f}",
                 f"{r['seconds']:.0f}")
                for r in content[name]["runs"]
            ]  # fmt: skip
            print(f"dense {dense:.1f}")
            titles = (
                "share of block parameters",
                "rule",
                "perplexity",
                "over dense",
                "seconds, not scoring or judging",
            )
            print(results.table(titles, rows))
        results.write("search", content)


if __name__ == "__main__":
    main()
