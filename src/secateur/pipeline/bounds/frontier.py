"""The frontier of cost and quality: pruned models that were measured on held-out data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Point(_Data):
    """One pruned and repaired model.

    Attributes:
        share: The share of `Frontier.cost` that its plan was to keep.
        macs: MACs over those of the dense model; None if no MACs are removed.
        params: Parameters over those of the dense model.
        value: The measured value on the held-out data: the accuracy, for example.
        damage: How much worse that is than the dense model's value, on the scale of `Frontier.bound`.
        low: Lower end of the interval of `damage`.
        high: Upper end.
        most: Upper confidence bound of the damage, with the confidence of `Frontier`.
        verdict: ``chosen``, ``within``, ``not confirmed``, or empty if there was no bound.
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
    """Models of different costs, and their quality. All plans come from one scoring.

    Attributes:
        cost: The cost that plans keep a share of: ``macs``, for example.
        bound: The field of `Budget` that `damage` belongs to.
        measure: The measured quantity, in words.
        dense: The dense model's value.
        samples: Number of held-out samples.
        confidence: Confidence of each interval, and of `most`.
        limit: The largest allowed damage; None if there is no bound.
        points: The models, from the largest to the smallest.
    """

    cost: str
    bound: str
    measure: str
    dense: float
    samples: int
    confidence: float
    limit: float | None = None
    points: tuple[Point, ...] = ()
