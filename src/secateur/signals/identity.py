"""Text that identifies a scoring run, to compare a run with its checkpoint and processes with each other."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration, map_tensors
from secateur.calibration.batch import held_tensors
from secateur.common.models import named_tensors
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
        "weights": digest_of(graph.program.state_dict),
        "groups": ", ".join(f"{group.name} of {group.size}" for group in graph.groups),
        "signals": "; ".join(map(_described, signals)),
        "loss_fn": loss,
        "seed": str(seed),
        "memory": "no limit" if memory is None else str(memory),
        "number of batches": "unknown" if batches is None else str(batches),
        "number of processes": str(processes),
        "versions": _versions(),
    }


def first_batch(data: Calibration) -> dict[str, str]:
    """What the first batch is: its layout, and a checksum of its tensors."""
    layout: list[str] = []

    def see(tensor: Tensor) -> Tensor:
        layout.append(f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch."))
        return tensor

    for raw in data.raw_batches():
        map_tensors(see, raw)
        keys = f"{sorted(map(str, raw))} " if isinstance(raw, Mapping) else ""
        return {
            "first batch": f"{keys}{', '.join(layout)}",
            "values in the first batch": f"{checksum(raw, 0):08x}",
        }
    return {}


def of_run(model: nn.Module, data: Calibration, **settings: object) -> dict[str, str]:
    """What processes have to agree on that work on one model: its weights, the data, and the settings."""
    return {
        "model": type(model).__name__,
        "weights": digest_of(named_tensors(model)),
        "number of batches": str(data.count()),
        **first_batch(data),
        **{name: plain(repr(value)) for name, value in settings.items()},
        "versions": _versions(),
    }


def of_data(data: Calibration) -> str:
    """What calibration data are: how they were cut from which source, and in which views they are seen.

    Batches in a list, and the tensors of a loader's `TensorDataset`, are identified by their values. A loader
    of anything else is known by its length, its first batch, and what its data set says as `content`.
    """
    return plain(f"{_source(data)}, seed {data.seed}, views {data.views!r}, most {data.most}")


def _source(data: Calibration) -> str:
    source: Any = data.source
    if dataclasses.is_dataclass(source) and not isinstance(source, type):
        values = ((each.name, getattr(source, each.name)) for each in dataclasses.fields(source))
        fields = (f"{name}={of_data(v) if isinstance(v, Calibration) else v!r}" for name, v in values)
        return f"{type(source).__name__}({', '.join(fields)})"
    if not isinstance(source, list | tuple):
        dataset = getattr(source, "dataset", None)
        tensors, content = getattr(dataset, "tensors", ()), getattr(dataset, "content", "")
        if isinstance(tensors, tuple) and all(isinstance(each, Tensor) for each in tensors):
            content = f"{content} {digest_of({str(i): tensor for i, tensor in enumerate(tensors)})}"
        return f"{type(source).__name__} of {data.count()}, {first_batch(data)}, {content}"
    digest = hashlib.sha256()
    for raw in source:
        tensors = held_tensors(raw)
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor))
        if not tensors:
            digest.update(plain(repr(raw)).encode())
    return f"{len(source)} batches {digest.hexdigest()}"


def checksum(raw: Any, before: int) -> int:
    """Continue the checksum of the batches before with the tensors of one more batch."""
    digest = before
    for tensor in held_tensors(raw):
        digest = zlib.crc32(raw_bytes(tensor), digest)
    return digest


def difference(expected: dict[str, str], got: dict[str, str]) -> str | None:
    """Name the first thing that differs, for a message: ``seed 0, got 1``; None if nothing does."""
    for what in (*expected, *got):
        if expected.get(what) != got.get(what):
            return f"{what} {_short(expected.get(what))}, got {_short(got.get(what))}"
    return None


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) <= 80 else f"{value[:80]}…"


def _described(signal: Signal) -> str:
    """The signal's class and settings."""
    given = sorted(getattr(signal, "__dict__", {}).items())
    settings = ", ".join(f"{name}={value!r}" for name, value in given)
    return plain(f"{type(signal).__qualname__}({settings})")


def plain(text: str) -> str:
    """The text without the addresses that some objects print."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _versions() -> str:
    return f"secateur {version('secateur')}, torch {torch.__version__}"


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors: their names, dtypes and values. [hex]"""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
