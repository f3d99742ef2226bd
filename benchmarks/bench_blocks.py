"""Residual blocks dropped whole, alone and with units: quality before and after repair, and time.

    python -m benchmarks.bench_blocks [smollm2] [shares] [resnet20] [--quick]

SmolLM2-135M loses blocks until 0.8 and 0.7 of the parameters of its blocks are left: by the change of the
outputs (`output_change`), and by the change of the stream (`stream_change`, ShortGPT). Perplexity is measured
on text that neither scores nor repairs have seen. Prefill and decoding are timed on this machine, dense and
pruned in turn; ideal is the inverse of the share of MACs. ResNet-20 keeps 0.8 of its MACs on CIFAR-10, all
at once and in four rounds (`steps`). Repair needs no labels: ``reconstruct`` for SmolLM2, ``auto`` for
ResNet-20.

With `shares`, SmolLM2-135M keeps 0.8, 0.7 and 0.5 of the parameters of its blocks, and blocks have a share of
the saving, from 0 (units alone: heads and neurons, by `repair_aware`) to 1 (blocks alone, by the change of
the outputs). The error is the one by which ``auto`` chooses, on held-out texts that repair has not seen;
perplexity is measured on others. The result file is written after each step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.resnet20 import top1, trained
from benchmarks.smollm2 import perplexity, smollm2, windows
from secateur.calibration import Calibration
from secateur.pipeline.targets.target import Task
from secateur.pipeline.targets.together import UnitsAndBlocks
from secateur.targets.together.rule import Together

SHARES = (0.8, 0.7)
"""Of the parameters of the blocks."""

AXES, OF_BLOCKS = (0.8, 0.7, 0.5), (0.0, 0.25, 0.5, 0.75, 1.0)
"""What `shares` keeps of the parameters of the blocks, and shares of the saving that blocks have."""

TEXTS, TOKENS, SCORED, JUDGED = 64, 64, 4, 16
"""Windows to repair with, their length, how many of them are scored, and windows of 256 tokens to measure."""

PREFILL, DECODE, PASSES = 256, 32, 7
"""Tokens that are read at once, tokens that are generated, and passes of each model."""

SIGNALS = ("output_change", "stream_change")

RULES: dict[str, tuple[Any, int]] = {
    "output_change": (sc.Global(removal="output_change"), 1),
    "output_change, 4 rounds": (sc.Global(removal="output_change"), 4),
    "stream_change": (sc.Global(removal="stream_change"), 1),
}


def seconds(models: Sequence[nn.Module], run: Callable[[nn.Module], Any]) -> list[float]:
    """The median time of each model, which take turns."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(PASSES + 1):
        for model, found in zip(models, times, strict=True):
            start = time.perf_counter()
            run(model)
            if turn:  # the first one warms up
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


@torch.no_grad()
def prefill(model: nn.Module) -> None:
    """Read a prompt."""
    model(torch.arange(PREFILL)[None], use_cache=False)


@torch.no_grad()
def decode(model: Any) -> None:
    """Generate after a short prompt, with a cache."""
    options = {"max_new_tokens": DECODE, "min_new_tokens": DECODE, "do_sample": False, "use_cache": True}
    model.generate(torch.arange(8)[None], attention_mask=torch.ones(1, 8, dtype=torch.long), **options)


def language_model(quick: bool) -> dict[str, Any]:
    """SmolLM2-135M."""
    model, tokenizer = smollm2()
    texts = windows(tokenizer, TOKENS)[: 56 if quick else TEXTS]
    test = windows(tokenizer, 256, second=True)[: 4 if quick else JUDGED]
    data = [{"input_ids": part} for part in texts.split(8)]
    graph = sc.trace(model, {"input_ids": texts[:2, :16]}, granularity="block")
    scores = sc.score(graph, [{"input_ids": texts[:SCORED]}], SIGNALS, progress=False)
    (group,) = graph.groups
    in_blocks = sum(cost.params for cost in graph.each[group.name])
    dense = perplexity(model, test)
    found: dict[str, Any] = {"dense": dense, "blocks": group.size, "runs": []}
    lines = []
    for share in SHARES[: 1 if quick else None]:
        budget = sc.Budget(params=int(graph.dense.params - (1 - share) * in_blocks))
        for name in SIGNALS:
            plan = sc.Global(removal=name).allocate(graph, scores, budget)
            small = sc.apply(model, plan, graph=graph)
            start = time.perf_counter()
            better = sc.repair(small, model, data, "reconstruct", graph=graph, progress=False)
            took = time.perf_counter() - start
            row = {
                "share": share, "rule": name, "seconds": took,
                "removed": list(plan.groups[0].removed),
                "macs": plan.predicted.macs / plan.dense.macs,
                "none": perplexity(small, test), "reconstruct": perplexity(better, test),
                "distance": [(t["before"], t["after"]) for t in sc.record_of(better).repairs],
            }  # fmt: skip
            if name == "output_change":
                for what, run in (("prefill", prefill), ("decode", decode)):
                    whole, less = seconds((model, small), run)
                    tokens = PREFILL if what == "prefill" else DECODE
                    row[what] = {"dense": tokens / whole, "pruned": tokens / less, "gain": whole / less}
            found["runs"].append(row)
            print(f"smollm2: {row}", file=sys.stderr, flush=True)
            gains = [f"{row[what]['gain']:.2f}" if what in row else "" for what in ("prefill", "decode")]
            lines.append(
                (
                    share,
                    name,
                    f"{row['none']:.1f}",
                    f"{row['reconstruct']:.1f}",
                    *gains,
                    f"{1 / row['macs']:.2f}",
                )
            )
    print(f"\nSmolLM2-135M, {group.size} blocks, perplexity of WikiText-2; dense {dense:.2f}")
    print(results.table(("share", "rule", "pruned", "repaired", "prefill ×", "decode ×", "ideal ×"), lines))
    return found


def shares(quick: bool) -> dict[str, Any]:
    """SmolLM2-135M, whose units and blocks save together."""
    model, tokenizer = smollm2()
    texts = windows(tokenizer, TOKENS)[: 16 if quick else 2 * TEXTS]
    test = windows(tokenizer, 256, second=True)[: 2 if quick else JUDGED]
    data = [{"input_ids": part} for part in texts.split(8)]
    example: Any = {"input_ids": texts[:2, :16]}
    start = time.perf_counter()
    graph: Any = sc.trace(model, example, granularity=["unit", "block"])  # type: ignore[call-overload]
    task = Task(model, Calibration.of(data, model=model), repair="reconstruct")
    target = UnitsAndBlocks(task, graph)
    rules = {share: with_share(share) for share in OF_BLOCKS}
    scores = target.scored(rules.values()).scores
    in_blocks = sum(cost.params for own in graph.others.each.values() for cost in own)
    judge, dense = target.judge(), perplexity(model, test)
    found: dict[str, Any] = {"dense": dense, "seconds": time.perf_counter() - start, "runs": []}
    print(f"shares: {found}", file=sys.stderr, flush=True)
    lines = []
    for kept in AXES[: 1 if quick else None]:
        budget = sc.Budget(params=int(graph.cost().params - (1 - kept) * in_blocks))
        for share in OF_BLOCKS[:: 2 if quick else 1]:
            plan = target.allocate(rules[share], scores, budget)
            start = time.perf_counter()
            better = target.candidate(plan, task.fit)
            row: dict[str, Any] = {
                "kept": kept, "share": share, "axes": plan.certificates["axes"],
                "macs": plan.predicted.macs / plan.dense.macs, "params": plan.predicted.params,
                "repaired": perplexity(better, test), "error": float(judge(better).mean()),
                "seconds": time.perf_counter() - start,
            }  # fmt: skip
            if not quick:  # masked and bypassed models are no faster
                small = sc.apply(model, plan, graph=graph)
                row["none"] = perplexity(small, test)
                for what, run in (("prefill", prefill), ("decode", decode)):
                    whole, less = seconds((model, small), run)
                    row[what] = whole / less
            found["runs"].append(row)
            print(f"shares: {row}", file=sys.stderr, flush=True)
            blocks = row["axes"]["block"]["removed"]
            named = [f"{row[k]:.2f}" if k in row else "" for k in ("none", "repaired", "prefill", "decode")]
            lines.append((kept, share, blocks, f"{row['error']:.4f}", *named, f"{1 / row['macs']:.2f}"))
            if not quick:
                results.write("blocks_shares", found)
    print(f"\nSmolLM2-135M by the share of the saving that blocks have, perplexity; dense {dense:.2f}")
    titles = ("kept", "share", "blocks", "error", "pruned", "repaired", "prefill ×", "decode ×", "ideal ×")
    print(results.table(titles, lines))
    return found


def with_share(share: float) -> Together:
    """Blocks by the change of the outputs, units by the errors that a refit leaves."""
    return Together(sc.RepairAware(per="params"), sc.Global(removal="output_change"), share, what="block")


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


SUBJECTS = {"smollm2": language_model, "shares": shares, "resnet20": pictures}


def main() -> None:
    """Runs the networks named on the command line, or both, and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="network", help=", ".join(SUBJECTS))
    parser.add_argument("--quick", action="store_true", help="less to measure on, no result file")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {name: SUBJECTS[name](asked.quick) for name in asked.networks or SUBJECTS}
    if not asked.quick:
        results.write("blocks" if not asked.networks else f"blocks_{'_'.join(asked.networks)}", found)


if __name__ == "__main__":
    main()
