"""How a rule was chosen, as data for a report."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Candidate(_Data):
    """A rule that was tried.

    Attributes:
        name: The name it is shown under.
        macs: Of its plan, as a share of the dense model's; None without a plan.
        params: Likewise, of the parameters.
        errors: What it measured on held-out data in each round that it ran in; lower is better.
        verdict: ``chosen``, or why not.
    """

    name: str
    macs: float | None
    params: float | None
    errors: tuple[float, ...]
    verdict: str


class Round(_Data):
    """A round of measurement.

    Attributes:
        repair: What repaired the candidates; empty for nothing.
        samples: How many calibration samples it worked on.
    """

    repair: str
    samples: int


class Selection(_Data):
    """How a rule was chosen by measurement.

    Attributes:
        measure: What the candidates' errors are.
        rounds: Those that were run.
        held: How many held-out samples judged.
        candidates: All of them, the winner first.
    """

    measure: str
    rounds: tuple[Round, ...]
    held: int
    candidates: tuple[Candidate, ...]
