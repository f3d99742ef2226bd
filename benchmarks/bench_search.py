"""What a search over allocations brings beside the rule that it starts from.

    python -m benchmarks.bench_search [depth] [resnet20] [smollm2]

No labels are read but to measure with. All plans are repaired by `reconstruct` with the same data.

- resnet20: channels inside the blocks at three budgets, 1,000 training images, three draws; judged on 3,000
  test images. depth: the same for the rules alone, without the search.
- smollm2: heads and neurons of SmolLM2-135M at shares of the parameters of its blocks, 64 texts of 256
  tokens, three draws without a common text; perplexity on other texts: FLAP's rule with its own compensation
  (`benchmarks/flap.py`) beside `RepairAware`, the start of a search, refitted, and trained from there by
  `polish`: one pass over 160 texts, the 64 among them, in steps of 2; the last 8 are held out. Rows are
  written as they are found, and are not run again if the file has them for the same settings. A search there
  takes minutes for each plan, and was not measured.
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
FLAP, REFITTED, TRAINED = "flap", "repair_aware", "repair_aware, polished"


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


def on_smollm2(known: dict[str, Any], write: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Perplexity and processor time for every draw, rule and share.

    Args:
        known: What an earlier run found; rows of the same settings stay.
        write: Is called with all that was found after each row.
    """
    model, tokenizer = smollm2()
    texts = windows(tokenizer, LENGTH)
    judged = windows(tokenizer, LENGTH, second=True)[:JUDGED]
    graph = sc.trace(model, texts[:1])
    found: dict[str, Any] = {
        "dense": perplexity(model, judged),
        "texts": TEXTS,
        "tokens": LENGTH,
        "polished_texts": POLISHED - HELD,
        "polish": asdict(POLISH) | asdict(POLISH.with_defaults(graph)),
    }
    same = all(known.get(name) == value for name, value in found.items() if name != "dense")
    found["runs"] = known["runs"] if same else []
    for seed in SEEDS:
        one_draw(model, texts[POLISHED * seed :][:POLISHED], judged, seed, found, lambda: write(found))
    return found


def one_draw(
    model: torch.nn.Module,
    texts: torch.Tensor,
    judged: torch.Tensor,
    seed: int,
    found: dict[str, Any],
    write: Callable[[], Any],
) -> None:
    """Add the rows of one draw that are missing: those of FLAP, and ours.

    Args:
        model: SmolLM2.
        texts: Token ids to score, repair and polish with. [texts, tokens]
        judged: Token ids to measure with. [texts, tokens]
        seed: The number of the draw.
        found: All rows, under ``runs``.
        write: Is called after each row.
    """
    data = [text[None] for text in texts[:TEXTS]]
    every = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for name, p in model.named_parameters() if "layers." in name)
    target = Units(Task(model, sc.Calibration.of(data), repair="reconstruct"))
    budgets = {share: sc.Budget(params=every - round((1 - share) * blocks)) for share in SHARES}

    def missing(rule: str) -> dict[float, sc.Budget]:
        there = [r["share"] for r in found["runs"] if (r["draw"], r["rule"]) == (seed, rule)]
        return {share: budget for share, budget in budgets.items() if share not in there}

    def note(
        rule: str, share: float, plan: sc.Plan, small: torch.nn.Module, clock: float, **more: Any
    ) -> None:
        row = {
            "draw": seed,
            "rule": rule,
            "share": share,
            "params": plan.predicted.params / plan.dense.params,
            "kept": {g.name: g.kept for g in plan.groups if g.removed},
            "seconds": time.process_time() - clock,
            "perplexity": perplexity(small, judged),
            **more,
        }
        same = [(r["draw"], r["rule"], r["share"]) == (seed, rule, share) for r in found["runs"]]
        found["runs"] = [r for r, again in zip(found["runs"], same, strict=True) if not again] + [row]
        print({k: v for k, v in row.items() if k != "kept"}, file=sys.stderr, flush=True)
        write()

    if missing(FLAP):
        flap = sc.Global(removal="fluctuation", normalise="zscore")
        scores, mean = target.score([flap]), mean_inputs(model, target.graph, data)
        for share, budget in missing(FLAP).items():
            clock = time.process_time()
            plan = target.allocate(flap, scores, budget)
            small = compensated(target.apply(plan), model, target.graph, plan, mean)
            note(FLAP, share, plan, small, clock)
    if not missing(TRAINED):
        return
    ours = sc.RepairAware(per="params")
    known = target.score_candidates([ours])
    judge = Judge(model, sc.Calibration.of([text[None] for text in texts[-HELD:]]), by_scores=True)
    work = Work(lambda: target.graph, sc.Calibration.of(list(texts[:-HELD].split(STEP))), judge=judge)
    for share, budget in missing(TRAINED).items():
        clock = time.process_time()
        small, plan = target.plan_and_apply(ours, known.scores, budget)
        small = target.repaired(small, plan)
        note(REFITTED, share, plan, small, clock)
        clock, before = time.process_time(), float(judge(small).mean())
        POLISH.run(small, work)
        after = float(judge(small).mean())
        note(TRAINED, share, plan, small, clock, divergence=[before, after])


def smollm2_table(found: dict[str, Any]) -> str:
    """A row for each share and rule: means and spreads over draws."""
    lines = []
    for share in SHARES:
        for rule in (FLAP, REFITTED, TRAINED):
            mine = [r for r in found["runs"] if (r["share"], r["rule"]) == (share, rule)]
            values = [r["perplexity"] for r in mine]
            over = [value / found["dense"] for value in values]
            minutes = statistics.mean(r["seconds"] for r in mine) / 60
            lines.append(
                (share, rule, len(mine), plus_minus(values, 1), plus_minus(over, 2), f"{minutes:.1f}")
            )
    titles = ("share", "rule", "draws", "perplexity", "over dense", "minutes, not scoring or judging")
    return results.table(titles, lines)


def plus_minus(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


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
            known = content.get(name, {})
            content[name] = on_smollm2(
                known, lambda found: results.write("search", content | {"smollm2": found})
            )
            print(f"dense {content[name]['dense']:.1f}\n{smollm2_table(content[name])}")
        results.write("search", content)


if __name__ == "__main__":
    main()
