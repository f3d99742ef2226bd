"""Axes of a transformer side by side: whole heads, head sizes, neurons, and these together.

    python -m benchmarks.bench_axes [--quick]

SmolLM2-135M keeps 0.9 of the parameters of its blocks, or 0.8 where neurons may go too; its attentions
hold 0.25 of them. Each group of an axis loses the same fraction, by the signal ``reconstruction``. Head
sizes go in the model's own basis and in that of `align_heads`, and those of values alone: queries and keys
are turned by a rotary embedding, whose frequencies all layers share, so that their dimensions go in all
layers at once. Perplexity is measured before and after the repair ``reconstruct``, on text that neither
scores nor repairs have seen.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import secateur as sc
from benchmarks import results
from benchmarks.smollm2 import perplexity, smollm2, windows
from secateur.targets.headsizes.align import align_heads

TEXTS, TOKENS, SCORED, JUDGED = 32, 64, 8, 16
"""Windows to repair with, their length, how many of them are scored, and windows of 256 tokens to measure."""

NEURONS, QUERIES = "*mlp*", "*q_proj"


@dataclass(frozen=True)
class Axis:
    """What goes.

    Attributes:
        share: Of the parameters of the blocks that stay.
        granularity: As for `sc.trace`.
        ignore: Groups that stay.
        align: Whether heads are aligned first.
    """

    share: float
    granularity: Any
    ignore: tuple[str, ...] = ()
    align: bool = False


AXES = {
    "head sizes, aligned": Axis(0.9, "head_size", align=True),
    "whole heads": Axis(0.9, "unit", (NEURONS,)),
    "values, aligned": Axis(0.9, "head_size", (QUERIES,), align=True),
    "values": Axis(0.9, "head_size", (QUERIES,)),
    "head sizes": Axis(0.9, "head_size"),
    "neurons, 0.9": Axis(0.9, "unit", ("*attn*",)),
    "neurons": Axis(0.8, "unit", ("*attn*",)),
    "neurons and heads": Axis(0.8, "unit"),
    "neurons and values, aligned": Axis(0.8, ["unit", "head_size"], (QUERIES,), align=True),
}


def main() -> None:
    """Measure every axis, and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer axes and texts, no result file")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    model, tokenizer = smollm2()
    texts = windows(tokenizer, TOKENS)[: 16 if quick else TEXTS]
    test = windows(tokenizer, 256, second=True)[: 4 if quick else JUDGED]
    data = [{"input_ids": part} for part in texts.split(8)]
    example = {"input_ids": texts[:2, :16]}
    in_blocks = sum(p.numel() for p in model.model.layers.parameters())  # type: ignore[union-attr]
    dense = perplexity(model, test)
    found: dict[str, Any] = {"dense": dense, "runs": []}
    rule = sc.Uniform(removal="reconstruction")
    trace: Any = sc.trace
    for name, axis in list(AXES.items())[: 2 if quick else None]:
        start = time.perf_counter()
        graph, base = trace(model, example, granularity=axis.granularity), model
        if axis.align:
            base, _ = align_heads(model, graph, data, progress=False)
            graph = trace(base, example, granularity=axis.granularity)
        scores = sc.score(graph, data[: SCORED // 8], "reconstruction", progress=False)
        budget = sc.Budget(params=int(graph.cost().params - (1 - axis.share) * in_blocks))
        plan = rule.allocate(graph, scores, budget, sc.Limits(ignore=axis.ignore))
        small = sc.apply(base, plan, graph=graph)
        better = sc.repair(small, base, data, "reconstruct", graph=graph, progress=False)
        row = {
            "axis": name, "share": axis.share, "form": sc.record_of(small).form,
            "macs": plan.predicted.macs / plan.dense.macs, "none": perplexity(small, test),
            "reconstruct": perplexity(better, test), "seconds": time.perf_counter() - start,
        }  # fmt: skip
        found["runs"].append(row)
        print(f"axes: {row}", file=sys.stderr, flush=True)
    lines = [
        (r["axis"], r["share"], f"{r['macs']:.3f}", f"{r['none']:.1f}", f"{r['reconstruct']:.1f}")
        for r in found["runs"]
    ]
    print(f"SmolLM2-135M, perplexity of WikiText-2; dense {dense:.2f}")
    print(results.table(("axis", "share of the blocks", "MACs", "pruned", "repaired"), lines))
    if not quick:
        results.write("axes", found)


if __name__ == "__main__":
    main()
