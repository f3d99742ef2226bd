"""Bytes between processes: counted on paper, and in two processes that score together."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.scale.scoring import Observed, readers
from benchmarks.scale.subject import Subject
from secateur.signals.units.wasserstein import Wasserstein


def sent(subject: Subject, name: str, kept: int | None = None, seen: int | None = None) -> int:
    """Bytes of tensors that a process other than the first sends of one signal (`Team.to_first`).

    ``taylor``: the number of samples and a number a unit, 8 bytes each. ``wasserstein``: of each kept
    sample its batch, place and class, 24 bytes, and 4 a projection and entry at each site.
    ``reconstruction``: the sums of every reader.

    Args:
        subject: What is scored.
        name: Of the signal.
        kept: Samples that the process keeps; of two processes, half of all if not given.
        seen: As `kept`, of the samples that it reads.
    """
    if name == "taylor":
        return 8 + 8 * sum(group.size for group in subject.graph.groups)
    if name == "wasserstein":
        signal = Wasserstein()
        if kept is None:
            kept = min((seen or subject.samples) // 2, subject.classes * signal.per_class)
        sites = Observed.all(subject, signal)
        numbers = sum(site.entries * site.projections(signal) for site in sites)
        return 24 * kept + 4 * kept * numbers
    unique = {id(reader): reader for found in readers(subject).values() for reader in found}
    return sum(reader.state for reader in unique.values())


def returned(scores: Any) -> int:
    """Bytes of the scores that the first process sends to each other one: their pickle."""
    return len(pickle.dumps(scores))


def counted(make: Callable[[], Subject], signal: str, samples: int) -> dict[str, int]:
    """In one of several processes: what it sends, by how.

    Returns:
        ``tensors``: bytes of `torch.distributed.send`; ``objects``: bytes of objects that are gathered or
        broadcast.
    """
    import torch.distributed.distributed_c10d as within

    import secateur as sc

    found = {"tensors": 0, "objects": 0, "kept": 0}
    send, gather, broadcast = dist.send, within.all_gather, within.broadcast

    def sending(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["tensors"] += tensor.nbytes
        return send(tensor, *args, **kwargs)

    def gathering(into: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["objects"] += tensor.nbytes
        return gather(into, tensor, *args, **kwargs)

    def broadcasting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 0:
            found["objects"] += tensor.nbytes
        return broadcast(tensor, *args, **kwargs)

    subject = make()
    inputs = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 32, 32, generator=inputs)
    y = torch.arange(samples) % subject.classes
    data = list(zip(x.split(subject.batch), y.split(subject.batch), strict=True))
    dist.send, within.all_gather, within.broadcast = sending, gathering, broadcasting
    try:
        scores = sc.score(subject.graph, data, signal, progress=False)
    finally:
        dist.send, within.all_gather, within.broadcast = send, gather, broadcast
    found["returned"] = returned({name: dict(scores[name]) for name in scores.signals})
    return found


def measured(make: Callable[[], Subject], signal: str, samples: int) -> dict[str, int]:
    """What the second of two processes really sends, and what it should on paper."""
    from tests.signals.processes import in_processes

    first, second = in_processes(counted, 2, make, signal, samples)
    subject = make()
    per_class = Wasserstein().per_class
    batches = torch.arange(samples).split(subject.batch)
    own = torch.cat(batches[1::2]) % subject.classes
    kept = int(torch.bincount(own, minlength=subject.classes).clamp_max(per_class).sum())
    return {
        "predicted": sent(subject, signal, kept),
        "measured": second["tensors"],
        "objects": second["objects"],
        "objects_of_the_first": first["objects"],
        "scores_returned": first["returned"],
    }
