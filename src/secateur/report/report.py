"""What happened, as data: asked, achieved, before and after."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue

from secateur.plan import Plan


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Figures(_Data):
    """One model, measured.

    Attributes:
        stage: ``dense``, ``pruned`` or ``repaired``.
        params: Parameters.
        macs: Multiply-accumulate operations for one sample.
        weight_bytes: Bytes of parameters and buffers.
        loss: Mean on the data in `Report.judged_on`.
        measure: What `loss` is.
        accuracy: Top-1 in [0, 1], None where it is not defined.
        latency: Median seconds of a forward pass, None if it was not measured.
        latency_quartiles: Its first and third quartile.
        latency_batch: Samples in a pass.
    """

    stage: str
    params: int
    macs: int
    weight_bytes: int
    loss: float
    measure: str
    accuracy: float | None = None
    latency: float | None = None
    latency_quartiles: tuple[float, float] | None = None
    latency_batch: int | None = None


class Layer(_Data):
    """A group before and after."""

    group: str
    kept: int
    total: int
    producers: tuple[str, ...]


class Kept(_Data):
    """Something that could not be pruned, and why."""

    what: str
    reason: str
    where: str = ""


class Report(_Data):
    """All that a person may ask of a run of `prune`.

    Attributes:
        model: The dense model's class.
        asked: Budget, allocator, repair, form, granularity and seed, as given.
        settings: The allocator's settings, with what it solved for.
        figures: Dense, pruned and, if anything was kept of it, repaired.
        judged_on: What accuracy and loss were measured on.
        layers: Kept and total units of each group.
        untouched: What could not be pruned, and why.
        form: The form of the result, with `note` if that was not the one hoped for.
        proof: Relative difference to the reference, and what that was.
        repairs: What repair tried.
        certificates: What the allocator vouches for.
        seconds: Wall time of each phase.
        versions: secateur, torch, Python, platform.
        artefact: Where the model was saved, if it was.
    """

    model: str
    asked: dict[str, JsonValue]
    settings: dict[str, JsonValue]
    figures: tuple[Figures, ...]
    judged_on: str
    layers: tuple[Layer, ...]
    untouched: tuple[Kept, ...]
    form: str
    note: str
    proof: dict[str, JsonValue]
    repairs: tuple[dict[str, Any], ...]
    certificates: dict[str, JsonValue]
    seconds: dict[str, float]
    versions: dict[str, str]
    artefact: str | None = None

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to `path` if one is given."""
        text = self.model_dump_json(indent=1) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page, and return its path."""
        from secateur.report.html import render

        path = Path(path)
        path.write_text(render(self), encoding="utf-8")
        return path

    def __str__(self) -> str:
        """The table that `secateur prune` prints."""
        from secateur.report.text import table

        return table(self)


def versions() -> dict[str, str]:
    """What ran."""
    try:
        own = metadata.version("secateur")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {
        "secateur": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }


def layers_of(plan: Plan) -> tuple[Layer, ...]:
    """Kept and total units of each group of a plan."""
    return tuple(
        Layer(
            group=g.name,
            kept=g.kept,
            total=g.size,
            producers=tuple(dict.fromkeys(s.tensor for s in g.slices if s.role == "produce")),
        )
        for g in plan.groups
    )
