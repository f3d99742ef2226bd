"""The notes of this library's repairs on what they did, for a journal or a report."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class _Noted(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LayerNotes(_Noted):
    """How a refit changed one layer.

    Attributes:
        damping: The damping that was chosen; None if the weight did not change, or the method has none.
        before: Squared error of its output, as a share of the scatter of the targets, before.
        after: And after.
    """

    damping: float | None
    before: float
    after: float


class Notes(_Noted):
    """What `secateur.repairs.methods.Repair` and `secateur.repairs.polish.Polish` return.

    Attributes:
        layers: By the refitted weight's name.
        passes: Passes over the data.
        minutes: Minutes of training.
        updated: Names of the weights that the second-order update changed.
    """

    layers: dict[str, LayerNotes] | None = None
    passes: Annotated[int, Field(ge=0)] | None = None
    minutes: Annotated[float, Field(ge=0)] | None = None
    updated: list[str] | None = None


class Fitted(_Noted):
    """The result of refitting some layers, for the journal.

    Attributes:
        found: Notes on the fit, by the weight's name.
        near: The damping at which the next search starts.
    """

    found: dict[str, LayerNotes]
    near: float | None
