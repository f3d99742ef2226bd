"""Text that identifies a scoring run, to compare a run with its checkpoint and processes with each other."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib.metadata import version

import torch

from secateur.graph.graph import Graph
from secateur.signals.loss import LossFn
from secateur.signals.signal import Signal
from secateur.signals.storage import raw_bytes


def identity(
    graph: Graph,
    signals: Sequence[Signal],
    *,
    loss_fn: LossFn | None,
    seed: int,
    memory: int | None,
    batches: int | None,
    processes: int,
) -> dict[str, str]:
    """Everything that the scores depend on, apart from the data themselves, by what it is called."""
    loss = "default" if loss_fn is None else getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__)
    return {
        "model": graph.fingerprint,
        "weights": _weights(graph),
        "groups": ", ".join(f"{group.name} of {group.size}" for group in graph.groups),
        "signals": "; ".join(map(_described, signals)),
        "loss_fn": loss,
        "seed": str(seed),
        "memory": "no limit" if memory is None else str(memory),
        "number of batches": "unknown" if batches is None else str(batches),
        "number of processes": str(processes),
        "versions": f"secateur {version('secateur')}, torch {torch.__version__}",
    }


def difference(expected: dict[str, str], got: dict[str, str]) -> str | None:
    """Name the first thing that differs, for a message: ``seed 0, got 1``; None if nothing does."""
    for what in (*expected, *got):
        if expected.get(what) != got.get(what):
            return f"{what} {_short(expected.get(what))}, got {_short(got.get(what))}"
    return None


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) <= 80 else f"{value[:80]}…"


def _described(signal: Signal) -> str:
    """The signal's class and settings, without the addresses that some objects print."""
    given = sorted(getattr(signal, "__dict__", {}).items())
    settings = ", ".join(f"{name}={value!r}" for name, value in given)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(signal).__qualname__}({settings})")


def _weights(graph: Graph) -> str:
    digest = hashlib.sha256()
    for name, tensor in graph.program.state_dict.items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
