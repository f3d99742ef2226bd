"""Find likely reasons why a pruned model is not faster, from its plan and from the timings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.errors import ArtefactError
from secateur.measure.latency.measurement import Row
from secateur.targets.units.record import Record, record_of

MULTIPLE = 8
"""Number of 32-bit floats in a 256-bit vector register. Matrix kernels work in multiples of it."""

FEW = 0.1
"""If a smaller share of the MACs was removed than this, a gain cannot be seen above other costs."""

WIDE = 1.5
"""If the ends of an interval differ by more than this factor, the measurement is too noisy to judge."""


def reasons(small: nn.Module, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return likely reasons as sentences, the most likely first; empty if none is found.

    Args:
        small: The pruned model.
        rows: The timings. At least one row shows no gain.
    """
    try:
        record: Record | None = record_of(small)
    except ArtefactError:  # not pruned by secateur: only the timings can be used
        record = None
    found = [_noise(rows)]
    if record is not None:
        found += [_zeros(record), _few(record), _widths(record)]
    found += [_fixed_cost(rows), _not_in_macs(record, rows)]
    return tuple(reason for reason in found if reason)


def _noise(rows: Sequence[Row]) -> str:
    widest = max(
        (row for row in rows if row.verdict == "no gain"),
        key=lambda r: r.speedup.high / r.speedup.low,
        default=None,
    )
    if widest is None or widest.speedup.high / widest.speedup.low < WIDE:
        return ""
    return (
        f"Something else kept the machine busy: in {widest.backend} with a batch of {widest.batch} all from "
        f"{widest.speedup.low:.2f} to {widest.speedup.high:.2f} is possible. Measure again when it is idle, "
        f"with more rounds."
    )


def _zeros(record: Record) -> str:
    if record.form != "masked":
        return ""
    return (
        "The pruned model is in form masked: what was removed is zero, not gone, and a zero takes as long to "
        "multiply as any number. Apply the plan in form auto."
    )


def _few(record: Record) -> str:
    plan = record.plan
    gone = 1 - plan.predicted.macs / plan.dense.macs if plan.dense.macs else 0.0
    return f"Only {gone:.1%} of the MACs were removed. Ask for a smaller budget." if gone < FEW else ""


def _widths(record: Record) -> str:
    pruned = [g for g in record.plan.groups if g.removed]
    odd = [g for g in pruned if g.kept % MULTIPLE and g.size % MULTIPLE == 0]
    if record.form == "masked" or not odd:
        return ""
    return (
        f"{len(odd)} of {len(pruned)} pruned groups kept a number of units that is no multiple of {MULTIPLE} "
        f"({odd[0].name}: {odd[0].kept} of {odd[0].size}), which kernels fill up to the next one. Prune with "
        f"sc.Limits(round_to={MULTIPLE})."
    )


def _fixed_cost(rows: Sequence[Row]) -> str:
    """Blame the start of operators if a sample takes at least twice as long as in a larger batch."""
    for row in rows:
        larger = [r for r in rows if r.backend == row.backend and r.batch > row.batch]
        if row.verdict == "faster" or not larger:
            continue
        best = min(larger, key=lambda r: r.dense.median / r.batch)
        each, then = row.dense.median / row.batch, best.dense.median / best.batch
        if each >= 2 * then:
            return (
                f"In {row.backend}, a sample of the dense model takes {each / then:.1f} times as long in a "
                f"batch of {row.batch} as in one of {best.batch}: most of that time goes into starting "
                f"operators, of which the pruned model has as many. Use larger batches, or a back "
                f"end that fuses operators."
            )
    return ""


def _not_in_macs(record: Record | None, rows: Sequence[Row]) -> str:
    """Name a row in which the pruned model does fewer MACs per second than the dense one."""
    if record is None or record.form == "masked":
        return ""
    macs = record.plan.dense.macs, record.plan.predicted.macs
    for row in rows:
        dense, small = macs[0] * row.batch / row.dense.median, macs[1] * row.batch / row.pruned.median
        if row.verdict == "faster" or small >= dense:
            continue
        return (
            f"In {row.backend} with a batch of {row.batch}, the dense model does {dense / 1e9:.3g} billion "
            f"MACs a second and the pruned one {small / 1e9:.3g}: fewer MACs at a lower rate, so the time "
            f"goes into what does not shrink with them (starting operators, moving activations, narrow "
            f"kernels)."
        )
    return ""
