"""How much of each group goes: rules that turn scores into a plan."""

from secateur.allocate.base import Allocator, Staircase
from secateur.allocate.budget import Budget
from secateur.allocate.limits import Limits
from secateur.allocate.registry import names, resolve
from secateur.allocate.tod import ToD, tolerance_curve
from secateur.allocate.uniform import Uniform

__all__ = [
    "Allocator",
    "Budget",
    "Limits",
    "Staircase",
    "ToD",
    "Uniform",
    "names",
    "resolve",
    "tolerance_curve",
]
