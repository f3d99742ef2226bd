"""Low rank on SmolLM2-135M: linear layers as two, beside units, and both under one budget.

    python -m benchmarks.bench_rank [--ways rank,unit,unit+rank] [--quick]

Each way keeps 0.8 of the parameters of the blocks and takes equal fractions by the errors of
``reconstruction``: `rank` of the directions of each linear layer, `unit` of heads and neurons, `unit+rank` of
all of them in one allocation. All are repaired by ``reconstruct`` on the same few texts, without labels.
Perplexity is measured on text that nothing else has seen. The result file is written after each step.
"""

from __future__ import annotations

import argparse
import sys
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


def pruned(model: nn.Module, data: list[Any], way: str) -> tuple[Any, nn.Module, nn.Module, Any]:
    """The plan of one way, the model that it is about, the pruned model, and the graph."""
    budget = sc.Budget(
        params=int(sum(p.numel() for p in model.parameters()) - (1 - SHARE) * in_blocks(model))
    )
    dense = model if way == "unit" else sc.factorise(model, data, progress=False)
    example = {"input_ids": data[0]["input_ids"][:2, :16]}
    graph: Any = sc.trace(dense, example, granularity=way.split("+"))  # type: ignore[call-overload]
    scores = sc.score(graph, data, "reconstruction", progress=False)
    plan = sc.Uniform(removal="reconstruction").allocate(graph, scores, budget)
    plan = plan if way == "unit" else without_losses(graph, plan)
    return plan, dense, sc.apply(dense, plan, graph=graph), graph


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
        plan, own, small, graph = pruned(model, data, way)
        row: dict[str, Any] = {
            "way": way,
            "blocks": in_blocks(small) / found["blocks"],
            "params": sum(p.numel() for p in small.parameters()),
            "predicted": plan.predicted.params,
            "macs": plan.predicted.macs / plan.dense.macs,
            "pairs": sum(isinstance(m, sc.LowRank) for m in small.modules()),
            "pruned": perplexity(small, test),
            "repaired": float("nan"),
        }
        rows.append(row)
        print(f"rank: {row}", file=sys.stderr, flush=True)
        repaired = sc.repair(small, own, data, "reconstruct", graph=graph, progress=False)
        row["repaired"] = perplexity(repaired, test)
        print(f"rank: {row}", file=sys.stderr, flush=True)
        if not asked.quick:
            results.write("rank", {**found, "runs": rows})
    print(f"\nSmolLM2-135M, perplexity of WikiText-2; dense {found['dense']:.2f}")
    print(
        results.table(
            ("way", "of the blocks", "parameters", "two layers", "pruned", "repaired"),
            [
                (r["way"], f"{r['blocks']:.3f}", f"{r['params'] / 1e6:.1f} M", str(r["pairs"]),
                 f"{r['pruned']:.1f}", f"{r['repaired']:.1f}")
                for r in rows
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
