"""The record of a choice among allocators, as data for the report."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Candidate(_Data):
    """One allocator that was tried.

    Attributes:
        name: The name that the report shows.
        macs: MACs of its plan over those of the dense model; None without a plan, or if no MACs are removed.
        params: Parameters of its plan over those of the dense model; None without a plan.
        errors: Its mean error on held-out data in each round in which it ran. Lower is better.
        verdict: ``chosen``, or why it was not chosen.
    """

    name: str
    macs: float | None
    params: float | None
    errors: tuple[float, ...]
    verdict: str


class Round(_Data):
    """One round of measurement.

    Attributes:
        repair: Names of the repairs that the candidates got; empty if none.
        samples: Number of calibration samples that the repairs used.
    """

    repair: str
    samples: int


class Selection(_Data):
    """How an allocator was chosen by measurement.

    Attributes:
        measure: The kind of error that was measured.
        rounds: The rounds that were run.
        held: Number of held-out samples that errors were measured on.
        candidates: All candidates, the winner first.
    """

    measure: str
    rounds: tuple[Round, ...]
    held: int
    candidates: tuple[Candidate, ...]
