"""Allocators: they decide from scores how many units of each group are removed."""

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.curve import Curve
from secateur.allocators.decision import Decision
from secateur.allocators.distortion import Distortion
from secateur.allocators.effective_size import effective_number, effective_size
from secateur.allocators.emp import EMP, retained_bound
from secateur.allocators.erk import ERK
from secateur.allocators.global_ranking import Global
from secateur.allocators.lamp import LAMP
from secateur.allocators.limits import Limits
from secateur.allocators.owl import OWL
from secateur.allocators.ratios import Ratios
from secateur.allocators.registry import names, resolve
from secateur.allocators.repair_aware import RepairAware
from secateur.allocators.repairability import Repairability
from secateur.allocators.step_function import StepFunction
from secateur.allocators.tod import ToD, tolerance_curve
from secateur.allocators.uniform import Uniform
from secateur.allocators.unit_distortions import unit_distortions

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
