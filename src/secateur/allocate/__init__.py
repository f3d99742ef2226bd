"""Allocators: they decide from scores how many units of each group are removed."""

from secateur.allocate.base import Allocator
from secateur.allocate.budget import Budget
from secateur.allocate.curve import Curve
from secateur.allocate.decision import Decision
from secateur.allocate.distortion import Distortion
from secateur.allocate.effective_size import effective_number, effective_size
from secateur.allocate.emp import EMP, retained_bound
from secateur.allocate.erk import ERK
from secateur.allocate.global_ranking import Global
from secateur.allocate.lamp import LAMP
from secateur.allocate.limits import Limits
from secateur.allocate.owl import OWL
from secateur.allocate.ratios import Ratios
from secateur.allocate.registry import names, resolve
from secateur.allocate.repair_aware import RepairAware
from secateur.allocate.repairability import Repairability
from secateur.allocate.step_function import StepFunction
from secateur.allocate.tod import ToD, tolerance_curve
from secateur.allocate.uniform import Uniform
from secateur.allocate.unit_distortions import unit_distortions

__all__ = [
    "EMP",
    "ERK",
    "LAMP",
    "OWL",
    "Allocator",
    "Budget",
    "Curve",
    "Decision",
    "Distortion",
    "Global",
    "Limits",
    "Ratios",
    "RepairAware",
    "Repairability",
    "StepFunction",
    "ToD",
    "Uniform",
    "effective_number",
    "effective_size",
    "names",
    "resolve",
    "retained_bound",
    "tolerance_curve",
    "unit_distortions",
]
