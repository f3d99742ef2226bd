"""Format the timing of two models as text."""

from __future__ import annotations

import textwrap

from secateur.common.formatting import milliseconds
from secateur.measure.latency.measurement import Measurement, Row

WIDTH = 100


def table(bench: Measurement) -> str:
    """Return the table, a summary, likely reasons for rows without a gain, and the failed back ends."""
    heads = ("back end", "batch", "dense", "pruned", "speed-up", f"{bench.confidence:.0%} interval", "")
    lines = [heads, *(_cells(row) for row in bench.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    shown = [
        "  ".join(
            cell.ljust(width) if i in (0, len(heads) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    threads = "1 thread" if bench.threads == 1 else f"{bench.threads} threads"
    shown += [
        "",
        *_wrap(
            f"Median seconds of {bench.rounds} forward passes of each model in turn, after {bench.warmup} "
            f"that do not count, on {bench.device} with {threads}."
        ),
        *_wrap(summary(bench)),
    ]
    if bench.reasons:
        shown += ["", "why is there no speed-up?", *(line for r in bench.reasons for line in _wrap(r, "  "))]
    for name, reason in bench.failed.items():
        shown += _wrap(f"{name} could not run both models: {reason}")
    return "\n".join(shown)


def summary(bench: Measurement) -> str:
    """Return one sentence that says in which rows the pruned model is faster, and in which it is not."""
    best = max(bench.rows, key=lambda row: row.speedup.low)
    without = [row for row in bench.rows if row.verdict != "faster"]
    if len(without) == len(bench.rows):
        return "The pruned model is not measurably faster: every interval includes 1 or lies below it."
    where = f"{best.backend} with a batch of {best.batch}"
    text = f"The pruned model is {best.speedup.value:.2f} times as fast in {where}"
    if not without:
        return f"{text}, and faster in every row."
    return f"{text}; no gain in {', '.join(f'{row.backend} with {row.batch}' for row in without)}."


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "" if row.verdict == "faster" else row.verdict
    speedup = row.speedup
    return (
        row.backend,
        f"{row.batch:,}",
        milliseconds(row.dense.median),
        milliseconds(row.pruned.median),
        f"{speedup.value:.2f} ×",
        f"{speedup.low:.2f} to {speedup.high:.2f}",
        verdict,
    )


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + ("  " if indent else ""),
        break_long_words=False,
        break_on_hyphens=False,
    )
