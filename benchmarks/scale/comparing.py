"""Predictions beside measurements."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

import secateur as sc
from benchmarks.scale.networks import SMALL, on_meta
from benchmarks.scale.predicting import PIPELINES, Phase, phases, units
from benchmarks.scale.subject import Subject
from secateur.graph.trace import trace
from secateur.signals.memory import passes
from secateur.signals.registry import SIGNALS

LIMIT = 32 * 10**9
"""Bytes; for how many passes a memory limit makes of one."""

WIDE = 2.0
"""A prediction that is off by more than this factor is named."""


def checked(name: str, found: Mapping[str, Any], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every phase of a small network, predicted on the meta device, beside what was measured."""
    predicted = {p.name: p.work for p in phases(name, on_meta(SMALL[name]()))}
    rows = []
    for phase, measured in found["phases"].items():
        work = predicted[phase]
        row = {
            "phase": phase,
            "predicted_seconds": work.seconds(rates),
            "measured_seconds": measured["seconds"],
            "seconds_ratio": work.seconds(rates) / measured["seconds"],
        }
        if work.peak:
            row |= {
                "predicted_bytes": work.peak,
                "measured_bytes": measured["peak_bytes"],
                "bytes_ratio": work.peak / measured["peak_bytes"],
            }
        rows.append(row)
    return rows


def off(rows: list[dict[str, Any]]) -> list[str]:
    """The predictions that are off by more than `WIDE`."""
    found = []
    for row in rows:
        for what in ("seconds", "bytes"):
            ratio = row.get(f"{what}_ratio", 1.0)
            if not 1 / WIDE <= ratio <= WIDE:
                found.append(f"{row['phase']} ({what} {ratio:.2f})")
    return found


def predicted(name: str, subject: Subject, rates: Mapping[str, float]) -> dict[str, Any]:
    """Every phase of a network of true size; tracing and allocating need no values and are measured."""
    rows = [_row(phase, subject, rates) for phase in phases(name, subject)]
    found: dict[str, Any] = {
        "name": subject.name,
        "model_bytes": subject.bytes,
        "params": sum(p.numel() for p in subject.model.parameters()),
        "samples": subject.samples,
        "samples_without_labels": subject.repaired,
        "batch": subject.batch,
        "classes": subject.classes,
        "phases": rows,
    }
    if units in PIPELINES[name]:
        found["passes"] = _passes(subject)
    found["measured_here"] = _units_here(subject) if units in PIPELINES[name] else _experts_here(subject)
    return found


def _row(phase: Phase, subject: Subject, rates: Mapping[str, float]) -> dict[str, Any]:
    work = phase.work
    return {
        "phase": phase.name,
        "seconds": work.seconds(rates),
        "products": work.products,
        "dominant": work.dominant(rates),
        "dominant_share": work.amounts[work.dominant(rates)]
        / rates[work.dominant(rates)]
        / work.seconds(rates),
        "total_bytes": subject.bytes + work.peak,
        "sent_bytes": phase.sent,
        "amounts": dict(work.amounts),
    }


def _passes(subject: Subject) -> dict[str, int]:
    """Over the data, for each heavy signal that can be asked for, with ``memory=LIMIT``."""
    asked = [SIGNALS["reconstruction"]()] + ([SIGNALS["wasserstein"]()] if subject.classes else [])
    return {s.name: len(passes(subject.graph, [s], LIMIT, subject.classes)) for s in asked}


def _units_here(subject: Subject) -> dict[str, float]:
    """Seconds of processor time of `trace`, and of ToD on random scores, at the true shape."""
    start = time.process_time()
    graph = trace(subject.model, subject.inputs(2))
    traced = time.process_time()
    drawn = np.random.default_rng(0)
    names = ("wasserstein", "taylor")
    scores = {name: {g.name: drawn.random(g.size) for g in graph.groups} for name in names}
    sc.ToD().allocate(graph, scores, sc.Budget(macs=0.5))
    return {"trace_seconds": traced - start, "allocate_seconds": time.process_time() - traced}


def _experts_here(subject: Subject) -> dict[str, float]:
    """The same for experts."""
    start = time.process_time()
    graph = sc.trace(
        subject.model, {k: v for k, v in subject.inputs(1).items() if k != "labels"}, granularity="expert"
    )
    traced = time.process_time()
    scores = sc.score(graph, None, "random", progress=False)
    sc.Uniform(removal="random").allocate(graph, scores, sc.Budget(experts=0.5))
    return {"trace_seconds": traced - start, "allocate_seconds": time.process_time() - traced}
