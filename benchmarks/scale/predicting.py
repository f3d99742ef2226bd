"""Every phase of one subject, as work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.scale import applying, blocks, experts, repairing, scoring
from benchmarks.scale.exchange import sent
from benchmarks.scale.subject import Subject
from benchmarks.scale.work import Work


@dataclass(frozen=True)
class Phase:
    """One call.

    Attributes:
        name: Of the phase.
        work: What it takes.
        sent: Bytes that each further process sends to the first; None where nothing is shared.
    """

    name: str
    work: Work
    sent: int | None = None


def trace(subject: Subject) -> Work:
    """`sc.trace`: in the number of captured operators, whatever their sizes."""
    return Work({"nodes": len(list(subject.graph.program.graph.nodes))})


def units(subject: Subject) -> list[Phase]:
    """The pipeline for channels, neurons and heads."""
    found = [
        Phase("trace", trace(subject)),
        Phase("score: taylor", scoring.taylor(subject), sent(subject, "taylor")),
    ]
    if subject.classes:
        share = sent(subject, "wasserstein")
        found.append(Phase("score: wasserstein", scoring.wasserstein(subject), share))
        if subject.classes > 64:
            found.append(Phase("score: wasserstein, all pairs", scoring.wasserstein(subject, 1.0), share))
    found += [
        Phase("score: reconstruction", scoring.reconstruction(subject), sent(subject, "reconstruction")),
        Phase("apply", applying.apply(subject)),
        Phase("verify", applying.verify(subject)),
    ]
    if any("batch_norm" in str(node.target) for node in subject.graph.program.graph.nodes):
        found.append(Phase("repair: batchnorm", repairing.batchnorm(subject)))
    found += [
        Phase("repair: variance", repairing.sweep(subject, "variance")),
        Phase("repair: reconstruct", repairing.sweep(subject, "reconstruct")),
    ]
    return found


def weights(subject: Subject) -> list[Phase]:
    """Single weights of a language model, block by block."""
    return [
        Phase("weights: wanda", blocks.wanda(subject)),
        Phase("weights: surgeon", blocks.surgeon(subject)),
    ]


def mixture(subject: Subject) -> list[Phase]:
    """Experts."""
    found = experts.mixtures(subject)
    return [
        Phase("experts: score", experts.score(subject, found)),
        Phase("experts: repair", experts.repair(subject, found)),
    ]


PIPELINES: dict[str, tuple[Callable[[Subject], list[Phase]], ...]] = {
    "resnet50": (units,),
    "deit_b": (units,),
    "llama_7b": (units, weights),
    "qwen_moe": (mixture,),
    "resnet20": (units,),
    "deit": (units,),
    "llama": (units, weights),
    "moe": (mixture,),
}
"""Name of a network -> what is costed."""


def phases(name: str, subject: Subject) -> list[Phase]:
    """All phases of a network."""
    return [phase for pipeline in PIPELINES[name] for phase in pipeline(subject)]
