"""Reports as data, so that what a person sees is tested without a model."""

from __future__ import annotations

from typing import Any

from secateur.report.data import Figures, Histogram, Kept, Knob, Layer
from secateur.report.report import Report

DENSE = Figures(
    stage="dense",
    params=174_970,
    macs=40_813_184,
    weight_bytes=704_480,
    loss=0.0693,
    measure="loss",
    accuracy=0.9917,
    latency=0.00345,
    latency_quartiles=(0.00342, 0.0035),
    latency_runs=(0.00342, 0.00345, 0.0035, 0.0039),
    latency_batch=60,
    samples=360,
)
PRUNED = DENSE.model_copy(
    update={
        "stage": "pruned",
        "params": 91_606,
        "macs": 18_910_000,
        "weight_bytes": 369_720,
        "loss": 3.689,
        "accuracy": 0.1556,
        "latency": 0.00285,
        "latency_quartiles": (0.00281, 0.00289),
        "latency_runs": (0.00281, 0.00284, 0.00289, 0.0099),
    }
)
REPAIRED = PRUNED.model_copy(update={"stage": "repaired", "loss": 0.4909, "accuracy": 0.8972})

CERTIFICATES: dict[str, Any] = {
    "tolerance": 0.25,
    "groups": {
        "stem": {
            "removed": 6,
            "tod": 1 / 6,
            "overlap": 1,
            "overlap_bound": 1,
            "high_mass": 0.08,
            "high_mass_bound": 0.12,
            "mass": 0.178,
            "mass_bound": 0.399,
        },
        "body.conv": {
            "removed": 13,
            "tod": 3 / 13,
            "overlap": 2,
            "overlap_bound": 3,
            "high_mass": None,
            "high_mass_bound": None,
            "mass": None,
            "mass_bound": None,
        },
    },
}


REMOVAL = Histogram(
    signal="wasserstein", edges=(0.5, 1.0, 1.5, 2.0), kept=(0, 4, 6), removed=(4, 2, 0), cut=1.25
)
PROTECTION = Histogram(
    signal="taylor", edges=(0.01, 0.1, 1.0), kept=(3, 7), removed=(4, 2), cut=None, scale="log"
)
KNOB = Knob(
    values=(0.0, 0.125, 0.25, 0.5),
    macs=(40_813_184, 30_000_000, 25_000_000, 18_900_000, 4_000_000),
    params=(174_970, 140_000, 120_000, 91_000, 20_000),
    at=2,
)


def report(**changes: Any) -> Report:
    """A complete report, with `changes` made to it."""
    fields: dict[str, Any] = {
        "model": "DigitsNet",
        "asked": {
            "budget": {"macs": 0.5},
            "allocator": "tod",
            "granularity": "unit",
            "repair": "auto",
            "form": "auto",
            "seed": 7,
        },
        "settings": {
            "tolerance": 0.25,
            "removal": "wasserstein",
            "protection": "taylor",
            "limits": {"round_to": 8, "min_keep": 1, "max_ratio": 0.99, "ignore": []},
        },
        "figures": (DENSE, PRUNED, REPAIRED),
        "judged_on": "evaluation data",
        "layers": (
            Layer(
                group="stem",
                kept=10,
                total=16,
                producers=("stem.weight", "a.weight", "a.bias", "b.weight"),
                scores=(REMOVAL, PROTECTION),
            ),
            Layer(group="body.conv", kept=51, total=64, producers=("body.conv.weight", "body.conv.bias")),
        ),
        "knob": KNOB,
        "untouched": (
            Kept(what="head.weight axis 0", reason="model output"),
            Kept(what="head.bias axis 0", reason="model output"),
            Kept(what="norm", reason="mixed by layer_norm", where="net.py:12"),
        ),
        "form": "module",
        "note": "",
        "takes": "You may change axis 1 of x_1 (9 and 8 tried); you must keep axis 0 of x_1 at 4.",
        "proof": {"difference": 3.1e-16, "tolerance": 1e-9, "reference": "masked", "outputs": 1},
        "repairs": (
            {
                "method": "batchnorm",
                "kept": True,
                "measure": "loss",
                "before": 3.63,
                "after": 0.56,
                "held_out_samples": 60,
                "layers": {
                    "stem.weight": {"damping": 1e-3, "before": 0.5, "after": 0.125},
                    "body.conv.weight": {"damping": None, "before": 0.25, "after": 0.0625},
                },
            },
        ),
        "certificates": CERTIFICATES,
        "seconds": {"trace": 0.52, "score": 1.25},
        "versions": {"secateur": "0.1.0", "torch": "2.13.0"},
        "artefact": "demo",
    }
    return Report(**(fields | changes))
