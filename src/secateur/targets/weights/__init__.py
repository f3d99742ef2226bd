"""Prune single weights: score them, choose masks, and set the masked weights to zero."""

from secateur.targets.weights.distortion import distortions
from secateur.targets.weights.interop import from_torch, to_semi_structured, to_torch
from secateur.targets.weights.pattern import Pattern
from secateur.targets.weights.plan import MaskPlan
from secateur.targets.weights.projections import projections
from secateur.targets.weights.surgeon import surgeon
from secateur.targets.weights.weights import Weights

__all__ = [
    "MaskPlan",
    "Pattern",
    "Weights",
    "distortions",
    "from_torch",
    "projections",
    "surgeon",
    "to_semi_structured",
    "to_torch",
]
