"""Calibration data: what a user gives, turned into passes that repeat."""

from secateur.calibration.batch import Batch, is_soft, map_tensors
from secateur.calibration.calibration import Calibration
from secateur.calibration.randomness import seeded
from secateur.calibration.reading import Forward

__all__ = ["Batch", "Calibration", "Forward", "is_soft", "map_tensors", "seeded"]
