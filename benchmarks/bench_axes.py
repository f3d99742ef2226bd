"""Every axis of SmolLM2-135M, alone and together, at the same parameters of its blocks: quality and speed.

    python -m benchmarks.bench_axes [--ways unit,block,unit+block:0.5] [--shares 0.8,0.7,0.5] [--quick]

Ways are granularities of ``sc.prune``, and `width`, the hidden size (``sc.rotate`` and ``sc.narrow``). With
`unit+block:0.5` blocks have half of the saving and units the rest; ``auto`` would choose among such shares by
the error on held-out texts, which is in the result. All read the same few texts without labels and are
repaired by ``reconstruct``. Perplexity is measured on text that nothing else has seen. Prefill and decoding
are timed on this machine, dense and pruned in turn; ideal is the inverse of the share of MACs. A narrower
stream also narrows the embedding and the head, which is no longer tied to it: the parameters of the whole are
in the result. Rows are added to the result file as they are found; one of the same way and share is replaced.
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
from torch import Tensor, nn

import secateur as sc
from benchmarks import results
from benchmarks.smollm2 import perplexity, smollm2, windows

TEXTS, TOKENS, JUDGED = 64, 64, 16
"""Windows to calibrate with, their length, and windows of 256 tokens to measure."""

PREFILL, DECODE, PASSES = 256, 32, 7
"""Tokens that are read at once, tokens that are generated, and passes of each model."""

RULES: dict[str, Any] = {
    "unit": "repair_aware",
    "block": sc.Global(removal="output_change"),
    "head_size": "repair_aware",
    "rank": sc.Uniform(removal="reconstruction"),
    "unit+head_size": "repair_aware",
    "unit+rank": "repair_aware",
    **{
        f"unit+block:{share}": {
            "unit": sc.RepairAware(),
            "block": sc.Global(removal="output_change"),
            "share": share,
        }
        for share in (0.25, 0.5, 0.75)
    },
}
"""What decides along each axis."""


def in_blocks(model: Any) -> int:
    """Parameters of the blocks."""
    return sum(p.numel() for p in model.model.layers.parameters())


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


def speed(model: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Tokens per second of both, and how many times as fast the pruned one is."""
    found = {}
    for what, run, tokens in (("prefill", prefill, PREFILL), ("decode", decode, DECODE)):
        whole, less = seconds((model, small), run)
        found[what] = {"dense": tokens / whole, "pruned": tokens / less, "gain": whole / less}
    return found


def narrow(model: Any, data: list[Any], share: float) -> tuple[nn.Module, nn.Module]:
    """The model with a narrower stream, before and after repair; the width is a multiple of the heads."""
    heads = model.config.num_attention_heads
    width = int(share * model.config.hidden_size / heads) * heads
    turned = sc.rotate(model, data, progress=False)
    return sc.narrow(turned, data, width, repair=None, progress=False), sc.narrow(
        turned, data, width, progress=False
    )


def prune(model: Any, data: list[Any], share: float, way: str) -> tuple[nn.Module, nn.Module | None, Any]:
    """The repaired model, the one before repair where it is at hand, and the result of ``sc.prune``."""
    if way == "width":
        small, repaired = narrow(model, data, share)
        return repaired, small, None
    params = sum(p.numel() for p in model.parameters()) - (1 - share) * in_blocks(model)
    result = sc.prune(
        model, data, sc.Budget(params=int(params)), RULES[way], way.partition(":")[0].split("+"),
        repair="reconstruct", measure_latency=False, progress=False,
    )  # fmt: skip
    return result.model, None, result


def measured(model: nn.Module, data: list[Any], test: Tensor, share: float, way: str) -> dict[str, Any]:
    """A row of the table."""
    start = time.process_time()
    repaired, small, result = prune(model, data, share, way)
    row: dict[str, Any] = {
        "way": way, "share": share, "processor_seconds": time.process_time() - start,
        "blocks": in_blocks(repaired) / in_blocks(model),
        "params": sum(p.numel() for p in repaired.parameters()),
        "repaired": perplexity(repaired, test),
    }  # fmt: skip
    if small is not None:
        row["pruned"] = perplexity(small, test)
    if result is not None:
        row |= {
            "macs": result.plan.predicted.macs / result.plan.dense.macs,
            "repairs": [{k: t.get(k) for k in ("method", "kept", "before", "after")}
                        for t in result.report.repairs],
            "note": sc.record_of(repaired).note,
        }  # fmt: skip
        if result.report.selection is not None:
            row["candidates"] = [c.model_dump(mode="json") for c in result.report.selection.candidates]
    return row | speed(model, repaired)


def shown(found: dict[str, Any]) -> str:
    """The table: a line for each way and share."""
    lines = [
        (
            r["share"], r["way"], f"{r['repaired']:.1f}", f"{r['repaired'] / found['dense']:.2f}",
            f"{r['repairs'][-1]['after']:.3f}" if r.get("repairs") else "",
            f"{r['params'] / 1e6:.1f} M", *(f"{r[what]['gain']:.2f}" for what in ("prefill", "decode")),
            f"{1 / r['macs']:.2f}" if "macs" in r else "", f"{r['processor_seconds'] / 60:.1f}",
        )
        for r in sorted(found["runs"], key=lambda r: (-r["share"], r["repaired"]))
    ]  # fmt: skip
    titles = (
        "share",
        "way",
        "perplexity",
        "of dense",
        "held-out error",
        "parameters",
        "prefill ×",
        "decode ×",
        "ideal ×",
        "min",
    )
    return results.table(titles, lines)


def main() -> None:
    """Prunes along each axis, prints a table and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", default=",".join((*RULES, "width")))
    parser.add_argument("--shares", default="0.8,0.7,0.5")
    parser.add_argument("--quick", action="store_true", help="less to measure on, no result file")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    model, tokenizer = smollm2()
    data = [{"input_ids": part} for part in windows(tokenizer, TOKENS)[:TEXTS].split(8)]
    test = windows(tokenizer, 256, second=True)[: 2 if asked.quick else JUDGED]
    found = (not asked.quick and results.read("axes")) or {"runs": []}
    found |= {"dense": perplexity(model, test), "texts": [TEXTS, TOKENS, JUDGED]}
    for share in map(float, asked.shares.split(",")):
        for way in asked.ways.split(","):
            row = measured(model, data, test, share, way)
            rows = [r for r in found["runs"] if (r["way"], r["share"]) != (way, share)]
            found["runs"] = [*rows, row]
            print(f"axes: {row}", file=sys.stderr, flush=True)
            if not asked.quick:
                results.write("axes", found)
    print(f"\nSmolLM2-135M, perplexity of WikiText-2; dense {found['dense']:.2f}\n{shown(found)}")


if __name__ == "__main__":
    main()
