"""The hidden size of SmolLM2-135M: rotated, narrowed and repaired, beside units of its blocks.

    python -m benchmarks.bench_width [--quick]

Both ways keep about 0.8 of the parameters of the blocks; the stream's width is a multiple of the number of
heads, as its configuration asks. Units are heads and neurons, chosen by Wanda at equal fractions. Both are
repaired by ``reconstruct`` on the same texts, without labels. Narrowing the stream also narrows the embedding
and the head, which is no longer tied to it: the parameters of the whole are in the result. Perplexity is
measured on text that nothing else has seen. The result file is written after each way.
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
from secateur.targets.width.narrow import narrowed

SHARE = 0.8
"""Of the parameters of the blocks."""

TEXTS, TOKENS, JUDGED = 64, 64, 8
"""Windows to calibrate with, their length, and windows of 256 tokens to measure."""


def in_blocks(model: Any) -> int:
    """Parameters of the blocks."""
    return sum(p.numel() for p in model.model.layers.parameters())


def row(name: str, dense: nn.Module, small: nn.Module, repaired: nn.Module, test: Any, took: float) -> Any:
    """What is known of one way."""
    found = {
        "way": name,
        "blocks": in_blocks(small) / in_blocks(dense),
        "params": sum(p.numel() for p in small.parameters()),
        "pruned": perplexity(small, test),
        "repaired": perplexity(repaired, test),
        "seconds": took,
    }
    print(f"width: {found}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Prunes both ways, prints a table and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less to measure on, no result file")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    model, tokenizer = smollm2()
    data = [
        {"input_ids": part} for part in windows(tokenizer, TOKENS)[: 56 if asked.quick else TEXTS].split(8)
    ]
    test = windows(tokenizer, 256, second=True)[: 2 if asked.quick else JUDGED]
    dense = perplexity(model, test)
    rows = []

    start = time.perf_counter()
    turned = sc.rotate(model, data, progress=False)
    exact = perplexity(turned, test)
    print(f"width: rotated {exact:.3f}, dense {dense:.3f}", file=sys.stderr, flush=True)
    config: Any = model.config
    heads = config.num_attention_heads
    width = round(SHARE * config.hidden_size / heads) * heads
    small, like = narrowed(turned, (), {"input_ids": data[0]["input_ids"][:2]}, width)
    repaired = sc.repair(small, like, data, "reconstruct", progress=False)
    rows.append(row(f"width {width}", model, small, repaired, test, time.perf_counter() - start))

    found = {"dense": dense, "rotated": exact, "params": sum(p.numel() for p in model.parameters())}
    if not asked.quick:
        results.write("width", {**found, "runs": rows})

    start = time.perf_counter()
    graph = sc.trace(model, {"input_ids": data[0]["input_ids"][:2, :16]})
    scores = sc.score(graph, data, "wanda", progress=False)
    budget = sc.Budget(params=int(found["params"] - (1 - SHARE) * in_blocks(model)))
    plan = sc.Uniform(removal="wanda").allocate(graph, scores, budget)
    small = sc.apply(model, plan, graph=graph)
    repaired = sc.repair(small, model, data, "reconstruct", graph=graph, progress=False)
    rows.append(row("units", model, small, repaired, test, time.perf_counter() - start))

    print(f"\nSmolLM2-135M, perplexity of WikiText-2; dense {dense:.2f}, rotated {exact:.2f}")
    print(
        results.table(
            ("way", "of the blocks", "parameters", "pruned", "repaired"),
            [
                (r["way"], f"{r['blocks']:.3f}", f"{r['params'] / 1e6:.1f} M", f"{r['pruned']:.1f}",
                 f"{r['repaired']:.1f}")
                for r in rows
            ],
        )
    )  # fmt: skip
    if not asked.quick:
        results.write("width", {**found, "runs": rows})


if __name__ == "__main__":
    main()
