"""Prune single weights: score them, choose masks, and set the masked weights to zero."""

from secateur.masks.allocate import allocate
from secateur.masks.apply import apply, check
from secateur.masks.distortion import distortions
from secateur.masks.interop import from_torch, to_semi_structured, to_torch
from secateur.masks.pattern import Pattern
from secateur.masks.plan import MaskPlan
from secateur.masks.projections import projections
from secateur.masks.score import CRITERIA, score
from secateur.masks.surgeon import surgeon
from secateur.masks.weights import Weights

__all__ = [
    "CRITERIA",
    "MaskPlan",
    "Pattern",
    "Weights",
    "allocate",
    "apply",
    "check",
    "distortions",
    "from_torch",
    "projections",
    "score",
    "surgeon",
    "to_semi_structured",
    "to_torch",
]
