"""What removing, and proving that it was right, takes."""

from __future__ import annotations

from benchmarks.scale.passes import forward
from benchmarks.scale.subject import Subject
from benchmarks.scale.work import Work
from secateur.measure.cost import weight_bytes

PROOF_SAMPLES = 8
"""Samples that `secateur.pipeline.result.few` leaves of the first batch."""


def apply(subject: Subject) -> Work:
    """`targets/units/realise.py`: program and module, cut while copied; one batch through each.

    Held: both, and what the batch takes.
    """
    run, small = forward(subject, subject.small), weight_bytes(subject.small)
    copied = Work({"bytes": 2 * 2 * small, "nodes": subject_nodes(subject)}, 2 * small)
    return copied + Work((run * 2).amounts, 2 * small + run.peak)


def verify(subject: Subject) -> Work:
    """`verify.py`: the masked dense network, then the pruned one, as float64 copies on a few samples.

    Held: the masked copy beside a float64 copy of it, and its activations in float64.
    """
    few = subject.part(min(subject.batch, PROOF_SAMPLES))
    item = max(t.itemsize for t in subject.graph.program.state_dict.values() if t.is_floating_point())
    wider = 8 // item
    dense, small = forward(few), forward(few, few.small)
    amounts = {
        f"{kind.split()[0]} float64" if kind.split()[0] in ("matmul", "convolution") else kind: v
        * (wider if kind == "bytes" else 1)
        for kind, v in (dense + small).amounts.items()
    }
    copies = (3 + 2 * wider) * subject.bytes + 2 * (1 + wider) * weight_bytes(subject.small)
    amounts["bytes"] += copies
    return Work(amounts, subject.bytes * (1 + wider) + wider * dense.peak)


def subject_nodes(subject: Subject) -> float:
    """Building and rewriting the program costs about as much for an operator as a twentieth of tracing it."""
    return len(list(subject.graph.program.graph.nodes)) / 20
