"""The measurements of a quantised model as data: size, time and quality of each stage in one runtime."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.common.reading import Count


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Stage(_Data):
    """The measurements of one model, as a file that ONNX Runtime runs.

    Attributes:
        stage: ``dense``, ``pruned`` or ``model``; with ``+ int8`` or ``+ int4`` behind it, the quantised one.
        file_bytes: Bytes of the file.
        loss: The mean loss, or the distance to the dense outputs.
        measure: What `loss` is: ``loss``, ``distance to dense`` or ``divergence from dense``.
        accuracy: Top-1 accuracy in [0, 1]; None if it is not defined.
        samples: Number of samples that loss and accuracy were measured on.
        seconds: Seconds of every timed pass; the stages run in turn. Empty if none was timed.
    """

    stage: str
    file_bytes: Count
    loss: float
    measure: str
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    samples: Count = 0
    seconds: tuple[Annotated[float, Field(ge=0)], ...] = ()


class Loss(_Data):
    """How much worse the quantised model is than the dense one, on the held-out data.

    Attributes:
        bound: The field of `Budget` that it belongs to: ``accuracy_drop``, ``loss_rise`` or
            ``perplexity_rise``.
        measure: The measured quantity, in words.
        value: The drop or rise, as a fraction.
        low: Lower end of its interval.
        high: Upper end.
        most: Upper confidence bound of `value`.
        limit: The largest value that the budget allows; None if it has no such bound.
        confidence: Confidence of the interval, and of `most`.
    """

    bound: str
    measure: str
    value: float
    low: float
    high: float
    most: float
    limit: float | None = None
    confidence: float = 0.95

    @property
    def within(self) -> bool | None:
        """Whether the limit is confirmed; None without a limit."""
        return None if self.limit is None else self.most <= self.limit


class QuantisedFigures(_Data):
    """All measurements of a quantised model.

    Attributes:
        kind: ``int8``: weights and activations; ``int4``: weights of matrix products.
        runtime: Name and version of the runtime of all stages.
        threads: Number of threads within an operator.
        batch: Number of samples in a timed pass.
        calibrated: Number of samples that activations were observed on; 0 for int4.
        distance: Distance of the quantised model's outputs to those of its source,
            sum ||a - b||^2 / sum ||b||^2, on the same data as the losses.
        stages: From the dense model to the quantised one.
        losses: Losses of quality relative to the first stage.
    """

    kind: Literal["int8", "int4"]
    runtime: str
    threads: Count
    batch: Count
    calibrated: Count
    distance: float
    stages: Annotated[tuple[Stage, ...], Field(min_length=2)]
    losses: tuple[Loss, ...] = ()
