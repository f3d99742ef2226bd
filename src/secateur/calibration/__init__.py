"""Calibration data: reads a user's data as batches, and gives the same batches in every pass."""

from secateur.calibration.batch import Batch, is_soft, map_tensors
from secateur.calibration.calibration import Calibration
from secateur.calibration.randomness import seeded
from secateur.calibration.reading import Forward
from secateur.calibration.views import View, Views

__all__ = ["Batch", "Calibration", "Forward", "View", "Views", "is_soft", "map_tensors", "seeded"]
