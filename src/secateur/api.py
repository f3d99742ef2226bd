"""The public names: what `secateur` gives when it is first asked for one."""

from secateur.allocators import (
    EMP,
    ERK,
    LAMP,
    OWL,
    Allocator,
    Budget,
    Global,
    Limits,
    Ratios,
    Repairability,
    RepairAware,
    ToD,
    Uniform,
    effective_size,
)
from secateur.artefact.export.export import export
from secateur.artefact.save import load, save
from secateur.calibration import Calibration, Views
from secateur.common.computing import compute_on
from secateur.common.mapped import map_weights
from secateur.errors import CalibrationError, SecateurError, UnreachableBudgetError, VerificationError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.measure.evaluate import evaluate
from secateur.measure.latency.bench import bench
from secateur.measure.latency.timing import latency
from secateur.pipeline.auto.auto import Auto
from secateur.pipeline.auto.search import Search
from secateur.pipeline.compare import compare
from secateur.pipeline.narrow import narrow
from secateur.pipeline.prune import prune
from secateur.pipeline.quantise import quantise
from secateur.pipeline.recover import recover
from secateur.pipeline.result import Result
from secateur.plan import Plan
from secateur.proof.verify import Proof, verify
from secateur.repairs.polish import Polish
from secateur.repairs.repair import repair
from secateur.report.report import Report
from secateur.signals import Scores, score
from secateur.targets.experts.checkpoint import prune_checkpoint
from secateur.targets.experts.empty import empty_weights
from secateur.targets.experts.equal import EqualCounts
from secateur.targets.units.apply import apply
from secateur.targets.units.record import record_of
from secateur.targets.weights import MaskPlan, Pattern
from secateur.targets.width.rotate import rotate

__all__ = [  # noqa: RUF022 grouped by what a reader looks for
    # The pipeline
    "prune",
    "trace",
    "score",
    "apply",
    "repair",
    "recover",
    "verify",
    "save",
    "load",
    "export",
    "quantise",
    "evaluate",
    "compare",
    "latency",
    "bench",
    "record_of",
    "map_weights",
    "compute_on",
    # The hidden size
    "rotate",
    "narrow",
    # Mixtures of experts
    "EqualCounts",
    "prune_checkpoint",
    "empty_weights",
    # How much of each
    "Allocator",
    "Auto",
    "Search",
    "Budget",
    "Limits",
    "ToD",
    "EMP",
    "Repairability",
    "RepairAware",
    "Ratios",
    "Uniform",
    "Global",
    "ERK",
    "LAMP",
    "OWL",
    "Pattern",
    "effective_size",
    # What the calls take and return
    "Calibration",
    "Graph",
    "MaskPlan",
    "Plan",
    "Polish",
    "Proof",
    "Report",
    "Result",
    "Scores",
    "Views",
    # Errors that code catches
    "SecateurError",
    "CalibrationError",
    "UnreachableBudgetError",
    "VerificationError",
]
