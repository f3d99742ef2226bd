"""Names of what a model is measured by, without torch, for reports."""

from __future__ import annotations

LOSS, DISTANCE, DIVERGENCE = "loss", "distance to dense", "divergence from dense"

MEASURES = {
    LOSS: "the mean loss",
    DISTANCE: "the squared distance to the dense model's outputs relative to their size",
    DIVERGENCE: "the divergence of the words' probabilities from the dense model's (Kullback-Leibler)",
}
"""How far a model is from what it should give, and what each name means."""
