"""Every public name, imported: what `secateur` hands out when it is first asked for one."""

from secateur.allocators import (
    EMP,
    ERK,
    LAMP,
    OWL,
    Allocator,
    Budget,
    Curve,
    Global,
    Limits,
    Ratios,
    Repairability,
    RepairAware,
    ToD,
    Uniform,
    effective_size,
    retained_bound,
)
from secateur.artefact.export.card import model_card
from secateur.artefact.export.checking import Exported
from secateur.artefact.export.export import export
from secateur.artefact.save import load, save
from secateur.calibration import Calibration
from secateur.errors import (
    ApplyError,
    ArtefactError,
    BudgetError,
    CalibrationError,
    CaptureError,
    ConstantScoresWarning,
    ExportError,
    InputError,
    NothingToPruneError,
    PlanError,
    ScoreError,
    SecateurError,
    SettingError,
    UnreachableBudgetError,
    VerificationError,
)
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.measure.cost import Cost, weight_bytes
from secateur.measure.evaluate import Evaluation, evaluate
from secateur.measure.latency.bench import Bench, bench
from secateur.measure.latency.timing import Latency, latency
from secateur.pipeline.auto import Auto
from secateur.pipeline.compare import Comparison, compare
from secateur.pipeline.prune import prune
from secateur.pipeline.recover import recover
from secateur.pipeline.result import Result
from secateur.plan import Plan
from secateur.proof.first_order import first_order_bound, loss_change
from secateur.proof.verify import Proof, verify
from secateur.repairs.repair import repair
from secateur.report.report import Report
from secateur.signals import (
    L1,
    L2,
    Activation,
    APoZ,
    BatchNormScale,
    Fisher,
    GeometricMedian,
    Magnitude,
    Product,
    Random,
    Rank,
    RankSum,
    Reconstruction,
    Scores,
    Signal,
    Snip,
    Taylor,
    TaylorSample,
    Wasserstein,
    score,
)
from secateur.targets.experts.checkpoint import prune_checkpoint, save_pretrained
from secateur.targets.experts.empty import empty_weights
from secateur.targets.experts.equal import EqualCounts
from secateur.targets.experts.graph import ExpertGraph
from secateur.targets.units.apply import apply
from secateur.targets.units.record import record_of
from secateur.targets.weights import MaskPlan, Pattern

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
    "model_card",
    "evaluate",
    "compare",
    "latency",
    "bench",
    "weight_bytes",
    "record_of",
    # Mixtures of experts
    "EqualCounts",
    "ExpertGraph",
    "prune_checkpoint",
    "save_pretrained",
    "empty_weights",
    # How much of each
    "Allocator",
    "Budget",
    "Limits",
    "ToD",
    "EMP",
    "Repairability",
    "Ratios",
    "RepairAware",
    "Uniform",
    "Global",
    "ERK",
    "LAMP",
    "OWL",
    "Pattern",
    "effective_size",
    "retained_bound",
    "first_order_bound",
    "loss_change",
    # What each is worth
    "Signal",
    "Wasserstein",
    "Activation",
    "APoZ",
    "Rank",
    "Reconstruction",
    "Taylor",
    "TaylorSample",
    "Fisher",
    "Snip",
    "Magnitude",
    "L1",
    "L2",
    "BatchNormScale",
    "GeometricMedian",
    "Random",
    "Product",
    "RankSum",
    # What the calls return
    "Bench",
    "Calibration",
    "Comparison",
    "Cost",
    "Curve",
    "Evaluation",
    "Exported",
    "Graph",
    "Latency",
    "MaskPlan",
    "Plan",
    "Proof",
    "Report",
    "Result",
    "Scores",
    # Errors
    "SecateurError",
    "ApplyError",
    "ArtefactError",
    "Auto",
    "BudgetError",
    "CalibrationError",
    "CaptureError",
    "ConstantScoresWarning",
    "ExportError",
    "InputError",
    "NothingToPruneError",
    "PlanError",
    "ScoreError",
    "SettingError",
    "UnreachableBudgetError",
    "VerificationError",
]
