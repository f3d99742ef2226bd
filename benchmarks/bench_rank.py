"""Low rank on SmolLM2-135M: linear layers as two, beside units, and both under one budget.

    python -m benchmarks.bench_rank [--ways rank,unit,unit+rank] [--quick]

Each way keeps 0.8 of the parameters of the blocks and is decided by ``repair_aware`` on the errors of
``reconstruction``: `rank` on the directions of each linear layer, `unit` on heads and neurons, `unit+rank` on
all of them in one allocation. All are repaired by ``reconstruct`` on the same few texts, without labels.
Perplexity is measured on text that nothing else has seen. The result file is written after each way.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import Any

from torch import nn

import secateur as sc
from benchmarks import results
from benchmarks.smollm2 import perplexity, smollm2, windows
from secateur.targets.lowrank.saving import without_losses

SHARE = 0.8
"""Of the parameters of the blocks."""

TEXTS, TOKENS, JUDGED = 64, 64, 8
"""Windows to calibrate with, their length, and windows of 256 tokens to measure."""

WAYS = ("rank", "unit", "unit+rank")


def in_blocks(model: Any) -> int:
    """Parameters of the blocks."""
    return sum(p.numel() for p in model.model.layers.parameters())


def pruned(model: nn.Module, data: list[Any], way: str) -> tuple[Any, nn.Module, nn.Module]:
    """The plan of one way, the pruned and the repaired model."""
    budget = sc.Budget(
        params=int(sum(p.numel() for p in model.parameters()) - (1 - SHARE) * in_blocks(model))
    )
    clock = time.perf_counter()

    def tick(what: str) -> None:
        nonlocal clock
        print(f"rank: {way}: {what} {time.perf_counter() - clock:.0f} s", file=sys.stderr, flush=True)
        clock = time.perf_counter()

    dense = model if way == "unit" else sc.factorise(model, data, progress=False)
    tick("factorise")
    example = {"input_ids": data[0]["input_ids"][:2, :16]}
    graph: Any = sc.trace(dense, example, granularity=way.split("+"))  # type: ignore[call-overload]
    tick("trace")
    scores = sc.score(graph, data, "reconstruction", progress=False)
    tick("score")
    plan = sc.RepairAware(per="params").allocate(graph, scores, budget)
    plan = plan if way == "unit" else without_losses(graph, plan)
    tick("allocate")
    small = sc.apply(dense, plan, graph=graph)
    tick("apply")
    repaired = sc.repair(small, dense, data, "reconstruct", graph=graph, progress=False)
    tick("repair")
    return plan, small, repaired


def main() -> None:
    """Prunes each way, prints a table and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", default=",".join(WAYS), help="which, separated by commas")
    parser.add_argument("--quick", action="store_true", help="less to measure on, no result file")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    model, tokenizer = smollm2()
    data = [{"input_ids": part} for part in windows(tokenizer, TOKENS)[:TEXTS].split(8)]
    test = windows(tokenizer, 256, second=True)[: 2 if asked.quick else JUDGED]
    found = {
        "dense": perplexity(model, test),
        "params": sum(p.numel() for p in model.parameters()),
        "blocks": in_blocks(model),
        "texts": [TEXTS, TOKENS],
    }
    rows: list[dict[str, Any]] = []
    for way in asked.ways.split(","):
        start = time.perf_counter()
        plan, small, repaired = pruned(model, data, way)
        took = time.perf_counter() - start
        gone = {group.name: len(group.removed) / group.size for group in plan.groups}
        rows.append(
            {
                "way": way,
                "blocks": in_blocks(small) / found["blocks"],
                "params": sum(p.numel() for p in small.parameters()),
                "predicted": plan.predicted.params,
                "macs": plan.predicted.macs / plan.dense.macs,
                "pairs": sum(isinstance(m, sc.LowRank) for m in small.modules()),
                "pruned": perplexity(small, test),
                "repaired": perplexity(repaired, test),
                "seconds": took,
                "removed": gone,
            }
        )
        said = {name: value for name, value in rows[-1].items() if name != "removed"}
        print(f"rank: {said}", file=sys.stderr, flush=True)
        if not asked.quick:
            results.write("rank", {**found, "runs": rows})
    print(f"\nSmolLM2-135M, perplexity of WikiText-2; dense {found['dense']:.2f}")
    print(
        results.table(
            ("way", "of the blocks", "parameters", "two layers", "pruned", "repaired", "seconds"),
            [
                (r["way"], f"{r['blocks']:.3f}", f"{r['params'] / 1e6:.1f} M", str(r["pairs"]),
                 f"{r['pruned']:.1f}", f"{r['repaired']:.1f}", f"{r['seconds']:.0f}")
                for r in rows
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
