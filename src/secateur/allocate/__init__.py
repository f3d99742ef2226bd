"""How much of each group goes: rules that turn scores into a plan."""

from secateur.allocate.base import Allocator
from secateur.allocate.budget import Budget
from secateur.allocate.curve import Curve
from secateur.allocate.decision import Decision
from secateur.allocate.limits import Limits
from secateur.allocate.registry import names, resolve
from secateur.allocate.staircase import Staircase
from secateur.allocate.tod import ToD, tolerance_curve
from secateur.allocate.uniform import Uniform

__all__ = [
    "Allocator",
    "Budget",
    "Curve",
    "Decision",
    "Limits",
    "Staircase",
    "ToD",
    "Uniform",
    "names",
    "resolve",
    "tolerance_curve",
]
