"""What happened, as data: asked, achieved, before and after. Other files write and draw it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal

import numpy
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from secateur.allocate.description import Description
from secateur.auto.selection import Selection

FORMAT = 1
"""Of the JSON. A newer version may add to it; what another version does not know it refuses by name."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Figures(_Data):
    """One model, measured.

    Attributes:
        stage: ``dense``, ``pruned`` or ``repaired``.
        params: Parameters.
        macs: Multiply-accumulate operations for one sample.
        weight_bytes: Bytes of parameters and buffers.
        loss: Mean on the data in `Facts.judged_on`.
        measure: What `loss` is.
        accuracy: Top-1 in [0, 1], None where it is not defined.
        samples: How many `loss` and `accuracy` are means over; None if unknown.
        latency: Median seconds of a forward pass, None if it was not measured.
        latency_quartiles: Its first and third quartile.
        latency_runs: Every counted pass. [s]
        latency_batch: Samples in a pass.
    """

    stage: str
    params: int
    macs: int
    weight_bytes: int
    loss: float
    measure: str
    accuracy: float | None = None
    samples: int | None = None
    latency: float | None = None
    latency_quartiles: tuple[float, float] | None = None
    latency_runs: tuple[float, ...] = ()
    latency_batch: int | None = None


class Histogram(_Data):
    """What a signal says of a group's units, and what became of them.

    Attributes:
        signal: Its name.
        edges: Bounds of the bins, ascending; a bin holds its lower bound, the last one both. [bins + 1]
        kept: Units that stay, by their score. [bins]
        removed: Units that go. [bins]
        cut: The lowest score that stays, if every unit that goes scores at most that; None where the
            signal does not part them so, or nothing goes.
        scale: Whether the bins are equally wide, or equal factors.
    """

    signal: str
    edges: tuple[float, ...]
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    cut: float | None
    scale: Literal["linear", "log"] = "linear"


class Layer(_Data):
    """A group before and after.

    Attributes:
        group: Its name.
        kept: Units that stay.
        total: Units before.
        producers: Tensors that produce them.
        scores: What the units were worth, by each signal.
    """

    group: str
    kept: int
    total: int
    producers: tuple[str, ...]
    scores: tuple[Histogram, ...] = ()


class Knob(_Data):
    """What every setting of the rule's knob would have left.

    Attributes:
        values: Of the knob, ascending; each holds from here up to the next. Below the first nothing goes. [n]
        macs: Multiply-accumulate operations for one sample; the first is the dense model's. [n + 1]
        params: Parameters, likewise. [n + 1]
        at: Where in `values` the plan's knob stands; None if nothing had to go.
    """

    values: tuple[float, ...]
    macs: tuple[int, ...]
    params: tuple[int, ...]
    at: int | None


class Kept(_Data):
    """Something that could not be pruned, and why."""

    what: str
    reason: str
    where: str = ""


class Facts(_Data):
    """All that a person may ask of a run of `prune`.

    Attributes:
        format: Of this data.
        model: The dense model's class.
        asked: Budget, allocator, repair, form, granularity, seed and what else was set, as given.
        rule: The rule that decided; empty if it is the allocator that was asked for.
        settings: The allocator's settings, with what it solved for.
        figures: Dense, pruned and, if anything was kept of it, repaired.
        judged_on: What accuracy and loss were measured on.
        calibration: How many samples and classes the scores were made from.
        layers: Kept and total units of each group, and their scores.
        knob: The curve of the rule's knob, None where the rule has none or it is not known.
        untouched: What could not be pruned, and why.
        form: The form of the result, with `note` if that was not the one hoped for.
        note: See `form`.
        takes: Which sizes of the result's inputs may change and which must stay, in one sentence.
        attributes: Numbers of modules and configurations that follow the new sizes, by path.
        proof: Relative difference to the reference, what that was, at which sizes, and what it could see.
        repairs: What repair tried.
        certificates: What the rule guarantees or predicts, as numbers.
        description: How the rule describes its decision; None in reports of older versions.
        contest: How the rule was chosen, where rules competed.
        seconds: Wall time of each phase.
        versions: secateur, torch, Python, platform.
        artefact: Where the model was saved, if it was.
        make_model: Line of Python that defines ``make_model``, which loading the artefact needs.
    """

    format: int = FORMAT
    model: str
    asked: dict[str, JsonValue]
    rule: str = ""
    settings: dict[str, JsonValue]
    figures: tuple[Figures, ...]
    judged_on: str
    calibration: dict[str, int] = Field(default_factory=dict)
    layers: tuple[Layer, ...]
    knob: Knob | None = None
    untouched: tuple[Kept, ...]
    form: str
    note: str
    takes: str = ""
    attributes: dict[str, JsonValue] = Field(default_factory=dict)
    proof: dict[str, JsonValue]
    repairs: tuple[dict[str, Any], ...]
    certificates: dict[str, JsonValue]
    description: Description | None = None
    contest: Selection | None = None
    seconds: dict[str, float]
    versions: dict[str, str]
    artefact: str | None = None
    make_model: str = ""


def versions(device: torch.device | None = None) -> dict[str, str]:
    """What ran, and on what.

    Args:
        device: Where the model is.
    """
    try:
        own = metadata.version("secateur")
    except metadata.PackageNotFoundError:
        own = "unknown"
    found: Mapping[str, str] = {
        "secateur": own,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads of torch",
    }
    if device is None or device.type == "cpu":
        return dict(found)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {**found, "device": name}
