"""Calibration data: what a user gives, turned into passes that repeat."""

from secateur.calibration.batch import Batch, map_tensors
from secateur.calibration.calibration import Calibration
from secateur.calibration.randomness import seeded

__all__ = ["Batch", "Calibration", "map_tensors", "seeded"]
