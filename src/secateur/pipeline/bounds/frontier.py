"""Cost against quality: pruned models from one scoring that were measured on held-out data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Point(_Data):
    """One pruned and repaired model.

    Attributes:
        share: The share of `Frontier.cost` that its plan was asked to keep.
        macs: MACs over those of the dense model; None if no MACs are removed.
        params: Parameters over those of the dense model.
        value: What it reaches on the held-out data: its accuracy, for example.
        damage: How much worse that is than the dense model's, in the terms of `Frontier.bound`.
        low: Lower end of the interval of `damage`.
        high: Upper end.
        most: The damage is at most this, with the confidence of `Frontier`.
        verdict: ``chosen``, ``within``, or why it was not.
    """

    share: float
    macs: float | None
    params: float
    value: float
    damage: float
    low: float
    high: float
    most: float
    verdict: str = ""


class Frontier(_Data):
    """What was found on the way from the dense model to a small one. All points come from one scoring.

    Attributes:
        cost: The cost that plans were asked to keep a share of: ``macs``, for example.
        bound: The field of `Budget` that `damage` is about.
        measure: What was measured, in words.
        dense: What the dense model reaches.
        samples: Held-out samples.
        confidence: Of the intervals, each by itself, and of `most`.
        limit: The largest damage that was asked for; None if none was.
        points: From the largest model to the smallest.
    """

    cost: str
    bound: str
    measure: str
    dense: float
    samples: int
    confidence: float
    limit: float | None = None
    points: tuple[Point, ...] = ()
