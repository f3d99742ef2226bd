"""The data of a report: what was asked, what was achieved, and the costs before and after."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Annotated, Any, Literal

import numpy
import torch
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    model_validator,
)

from secateur.allocators.description import Description
from secateur.common.reading import Count
from secateur.pipeline.auto.selection import Selection
from secateur.pipeline.bounds.frontier import Frontier
from secateur.pipeline.quantised import QuantisedFigures

FORMAT = 1
"""Version of the JSON format. A field that a version does not know is refused by name."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Figures(_Data):
    """The costs and the quality of one model.

    Attributes:
        stage: ``dense``, ``pruned`` or ``repaired``.
        params: Parameters.
        macs: Multiply-accumulate operations for one sample.
        weight_bytes: Bytes of parameters and buffers.
        loss: The mean loss, or the mean distance to the dense outputs, on the data in `Facts.judged_on`.
        measure: What `loss` is: ``loss``, ``distance to dense`` or ``divergence from dense``.
        accuracy: Top-1 accuracy in [0, 1]; None if it is not defined.
        samples: The number of samples behind `loss` and `accuracy`; None if unknown.
        latency: Median seconds of a forward pass; None if it was not measured.
        latency_quartiles: First and third quartile of the seconds.
        latency_runs: Seconds of every timed pass.
        latency_batch: Samples in a forward pass.
    """

    stage: str
    params: Count
    macs: Count
    weight_bytes: Count
    loss: float
    measure: str
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    samples: Count | None = None
    latency: float | None = None
    latency_quartiles: tuple[float, float] | None = None
    latency_runs: tuple[float, ...] = ()
    latency_batch: int | None = None


class Histogram(_Data):
    """Counts of a group's kept and removed units by their score.

    Attributes:
        signal: The signal's name.
        edges: Ascending bounds of the bins. A bin includes its lower bound; the last includes both.
            [bins + 1]
        kept: Number of kept units in each bin. [bins]
        removed: Number of removed units in each bin. [bins]
        cut: The lowest score of a kept unit, if no removed unit scores higher. None otherwise, or if
            nothing was removed.
        scale: ``linear`` for bins of equal width, ``log`` for bins whose edges grow by equal factors.
    """

    signal: str
    edges: tuple[float, ...]
    kept: Annotated[tuple[Count, ...], Field(min_length=1)]
    removed: tuple[Count, ...]
    cut: float | None
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _fits(self) -> Histogram:
        if not len(self.edges) - 1 == len(self.kept) == len(self.removed):
            raise ValueError(f"expected counts for {len(self.edges) - 1} bins")
        return self


class Layer(_Data):
    """The sizes of a group of units before and after pruning.

    Attributes:
        group: The group's name.
        kept: Number of units that are kept.
        total: Number of units before.
        producers: Names of the tensors that produce the units.
        scores: A histogram of the scores for each signal.
    """

    group: str
    kept: Count
    total: Count
    producers: tuple[str, ...]
    scores: tuple[Histogram, ...] = ()


_Cost = Annotated[int, Field(ge=-(1 << 48), le=1 << 48)]
"""What a curve predicts; for units and experts together, far below any plan, it can be less than nothing."""


class Knob(_Data):
    """The cost that every value of the rule's knob would leave: a step function.

    Attributes:
        values: Ascending values of the knob. Each holds up to the next. Below the first, nothing is
            removed. [n]
        macs: Multiply-accumulate operations for one sample. The first entry is the dense model's; entry
            i + 1 belongs to ``values[i]``. [n + 1]
        params: Parameters, in the same order. [n + 1]
        at: Index of the plan's value in `values`; None if nothing was removed.
    """

    values: tuple[float, ...]
    macs: tuple[_Cost, ...]
    params: tuple[_Cost, ...]
    at: Count | None

    @model_validator(mode="after")
    def _fits(self) -> Knob:
        if not len(self.values) + 1 == len(self.macs) == len(self.params):
            raise ValueError(f"expected costs for {len(self.values)} values and the dense model")
        if self.at is not None and self.at >= len(self.values):
            raise ValueError(f"expected the plan at one of {len(self.values)} values, got {self.at}")
        return self


class Kept(_Data):
    """A part of the model that could not be pruned.

    Attributes:
        what: Its name.
        reason: Why it could not be pruned.
        where: The place in the model that is the reason; may be empty.
    """

    what: str
    reason: str
    where: str = ""


class _Measured(BaseModel):
    """What a repair that was done says of itself, beside much else."""

    method: str
    kept: bool
    measure: str
    before: float | None
    after: float | None
    held_out_samples: Count


class _NotDone(BaseModel):
    """What one that was not done says."""

    method: str
    kept: bool
    why: str


_TRIED = TypeAdapter[_NotDone | _Measured](_NotDone | _Measured)


def _tried(entry: dict[str, Any]) -> dict[str, Any]:
    _TRIED.validate_python(entry)
    return entry


class Facts(_Data):
    """All data of a run of `prune`.

    Attributes:
        format: Version of this format.
        model: The dense model's class.
        asked: The settings as given: budget, allocator, repair, form, granularity, seed and others.
        rule: The rule that decided; empty if it is the allocator that was asked for.
        settings: The allocator's settings, with the values that it solved for.
        figures: The dense, the pruned and, if a repair was kept, the repaired model.
        judged_on: The data that accuracy and loss were measured on, in words.
        calibration: How many samples and classes were used for scoring.
        layers: Kept and total units of each group, and their scores.
        knob: The cost curve of the rule's knob; None if there is none.
        untouched: The parts that could not be pruned, and why.
        form: The form of the result.
        note: Why the result has this form, if another one would be preferred.
        lacking: What the calibration data are too few for, in a sentence or two; empty if they are not.
        rounding: Which multiple kept numbers have, and how it was measured; empty if it was not.
        takes: Which sizes of the result's inputs may change and which must stay, in one sentence.
        attributes: Numbers in modules and configurations that were set to the new sizes, by path.
        proof: The relative difference to the reference, what the reference was, at which input sizes, and
            which removed parts the comparison could see.
        repairs: The repairs that were tried.
        certificates: What the rule guarantees or predicts, as numbers.
        description: How the rule describes its decision; None in reports of older versions.
        selection: How the rule was selected, if several were compared. Older reports call it ``contest``.
        frontier: The models that were measured on held-out data, by cost; None if none was.
        quantised: What quantising the result brought; None if it was not quantised.
        seconds: Wall time of each phase.
        versions: Versions of secateur, torch and Python, and the platform.
        artefact: The folder of the saved model, if it was saved.
        make_model: Line of Python that defines ``make_model``, which loading the artefact needs.
    """

    format: int = FORMAT
    model: str
    asked: dict[str, JsonValue]
    rule: str = ""
    settings: dict[str, JsonValue]
    figures: Annotated[tuple[Figures, ...], Field(min_length=1)]
    judged_on: str
    calibration: dict[str, Count] = Field(default_factory=dict)
    layers: tuple[Layer, ...]
    knob: Knob | None = None
    untouched: tuple[Kept, ...]
    form: str
    note: str
    lacking: str = ""
    rounding: str = ""
    takes: str = ""
    attributes: dict[str, JsonValue] = Field(default_factory=dict)
    proof: dict[str, JsonValue]
    repairs: tuple[Annotated[dict[str, Any], AfterValidator(_tried)], ...]
    certificates: dict[str, JsonValue]
    description: Description | None = None
    selection: Selection | None = Field(default=None, validation_alias=AliasChoices("selection", "contest"))
    frontier: Frontier | None = None
    quantised: QuantisedFigures | None = None
    seconds: dict[str, float]
    versions: dict[str, str]
    artefact: str | None = None
    make_model: str = ""

    @property
    def origin(self) -> str:
        """Where the report was read from; empty if it was made by this process."""
        return str(self.__dict__.get("_origin", ""))


def versions(device: torch.device | None = None) -> dict[str, str]:
    """Return the versions of the software, the platform, the processor and the device.

    Args:
        device: The model's device; it is named if it is not the CPU.
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
