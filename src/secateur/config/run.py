"""Declare every setting of a run: its type, default, limits and help text.

The command line's options, the configuration files, their comments and their checks are all made from this
declaration. It imports pydantic, but not torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from secateur.common.seeds import LEAST, MOST
from secateur.config.names import Form, Granularity, Quantisation, Rule, Unrealisable
from secateur.config.sections import (
    BudgetSection,
    CompareSection,
    CurveSection,
    ImagesSection,
    LimitsSection,
    Settings,
    TextSection,
    TransitionSection,
)
from secateur.config.values import Listed, RepairName, Share, SignalName, entries

RULE_SETTINGS = {"ratio": "uniform", "tolerance": "tod", "protection": "tod", "parts": "repair_aware"}
"""The rule that each of these settings belongs to."""


def _whole_entries(value: Any) -> Any:
    """Make a list from one value. Commas do not split it."""
    return value if isinstance(value, list | tuple) else [value]


def _joined(given: Any) -> Any:
    """Return several granularities, in any order, as one name: ``block,unit`` as ``unit+block``."""
    if isinstance(given, str) and not {*",+"} & {*given}:
        return given
    try:
        return "+".join(sorted((each for part in entries(given) for each in part.split("+")), reverse=True))
    except AttributeError:  # an entry is no text
        return given


class Run(Settings):
    """The settings of all commands. Each command reads the part that it needs."""

    model: str | None = Field(
        default=None,
        description="The model: package.module:function or file.py:function that returns it, timm:NAME, a "
        "Hugging Face folder, mapped:FOLDER for one whose weights stay in its files, or a .pt2 file.",
        examples=["net.py:make"],
    )
    data: str | None = Field(
        default=None,
        description="Calibration data: module:function, .npz with arrays x and y, a folder of images with "
        "one folder for each class, a Hugging Face dataset folder, a .txt file, or cifar10:DIR, "
        "cifar100:DIR, svhn:DIR as published; cifar10-test:DIR for the test images.",
        examples=["x.npz"],
    )
    evaluation: str | None = Field(
        default=None,
        description="Data to measure accuracy on, as for data; by default a held-out fifth of the data.",
        examples=["test.npz"],
    )
    held_out: str | None = Field(
        default=None,
        description="Data to measure bounds on quality on, as for data; by default half of the data.",
        examples=["validation.npz"],
    )
    frontier: Listed[Share] = Field(
        default=(),
        description="Also measure the plans that keep these shares of the cost, for the report.",
        examples=[(0.9, 0.8, 0.7)],
    )
    quantise: Quantisation | None = Field(
        default=None,
        description="After repair, also write an ONNX file with weights and activations of 8 bits (int8), or "
        "weights of 4 bits (int4), calibrated with the data.",
        examples=["int8"],
    )
    device: str | None = Field(
        default=None,
        description="Device that computes: the model goes there. A model whose weights stay in files "
        "(mapped:FOLDER) stays, and its data go there.",
        examples=["cuda"],
    )
    input: Annotated[tuple[str, ...], BeforeValidator(_whole_entries)] = Field(
        default=(),
        description="Sizes of an input, such as 1x3x224x224 or 1x16:int64, if there is no data; one entry "
        "for each input.",
        examples=[("1x3x224x224",)],
        json_schema_extra={"commas": False},
    )
    batch_size: int = Field(default=64, ge=1, description="Samples in a batch, for data from files.")
    samples: int | None = Field(
        default=None,
        ge=2,
        description="Read at most this many samples from files, drawn at random.",
        examples=[1000],
    )
    views: int | None = Field(
        default=None,
        ge=1,
        description="Views of each sample, with the sample itself: crops and mirror images of pictures.",
        examples=[3],
    )
    images: ImagesSection = Field(
        default=ImagesSection(), description="How the pictures of a folder become inputs."
    )
    text: TextSection = Field(default=TextSection(), description="How a text becomes inputs.")
    granularity: Annotated[Granularity, BeforeValidator(_joined)] = Field(
        default="unit",
        description="What is removed: units (channels, neurons, heads), head sizes, experts, blocks or "
        "weights; or several: unit,block.",
    )
    budget: BudgetSection = Field(
        default=BudgetSection(), description="What the result may cost; if empty, the rule decides."
    )
    allocator: Rule | None = Field(
        default=None,
        description="Rule for how much of each layer is removed; by default auto, for single weights emp, "
        "for experts tod.",
        examples=["repair_aware"],
    )
    tolerance: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Tolerance of the rule tod, without a budget; by default 0.1.",
        examples=[0.1],
    )
    ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Fraction that the rule uniform removes, without a budget.",
        examples=[0.5],
    )
    parts: int | None = Field(
        default=None,
        ge=2,
        description="Number of parts that the rule repair_aware prunes alone, to weigh layers by depth.",
        examples=[4],
    )
    removal: SignalName | None = Field(
        default=None,
        description="Signal whose lowest scores are removed first; by default the rule's own.",
        examples=["wasserstein"],
    )
    protection: SignalName | None = Field(
        default=None,
        description="Signal of the rule tod whose highest scores are kept; by default taylor.",
        examples=["taylor"],
    )
    steps: int = Field(
        default=1, ge=1, description="Rounds of scoring, removal and repair; several rounds need a budget."
    )
    limits: LimitsSection = Field(default=LimitsSection(), description="Limits on what the rule may remove.")
    allow_inexact: bool = Field(default=False, description="Also prune groups whose units an operator mixes.")
    repair: Listed[RepairName] = Field(
        default=("auto",), description="Repairs, kept if they help; several are run in this order."
    )
    polish_passes: int | None = Field(
        default=None,
        ge=1,
        description="Passes over the data in the repair polish; by default 40, for a language model 4.",
        examples=[20],
    )
    form: Form = Field(default="auto", description="Form of the result; auto is a module if possible.")
    on_unrealisable: Unrealisable | None = Field(
        default=None,
        description="For form auto and groups that no module can express: graph for a captured program "
        "(default of apply), leave to keep them whole (default of prune).",
        examples=["leave"],
    )
    signals: Listed[SignalName] = Field(
        default=(),
        description="Signals that secateur score computes; by default those that the rule needs.",
        examples=[("wasserstein", "taylor")],
    )
    checkpoint: str | None = Field(
        default=None,
        description="Where a run is saved, to continue it after an interruption: a folder for secateur "
        "prune, a file for secateur score.",
        examples=["run.checkpoint"],
    )
    memory: str | None = Field(
        default=None, description="Most memory for scoring, in bytes or such as 2 GB.", examples=["2 GB"]
    )
    scores: str | None = Field(
        default=None,
        description="Table of scores: secateur score writes it, plan reads it.",
        examples=["scores.safetensors"],
    )
    plan: str | None = Field(
        default=None,
        description="Plan: secateur plan writes it, apply reads it. JSON; for single weights safetensors.",
        examples=["plan.json"],
    )
    artefact: str | None = Field(
        default=None,
        description="Folder of the result: prune and apply write it, repair reads it.",
        examples=["small"],
    )
    repaired: str | None = Field(
        default=None, description="Folder that secateur repair writes.", examples=["repaired"]
    )
    seed: int = Field(
        default=0,
        ge=LEAST,
        le=MOST,
        description="Seed for all random choices: the same seed gives the same plan.",
    )
    compare: CompareSection = Field(default=CompareSection(), description="Settings of secateur compare.")
    curve: CurveSection = Field(default=CurveSection(), description="Settings of secateur tolerance.")
    transition: TransitionSection = Field(
        default=TransitionSection(), description="Settings of secateur transition."
    )

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> Run:
        rule = self.rule
        for setting, of in RULE_SETTINGS.items():
            if getattr(self, setting) is not None and rule != of:
                raise ValueError(f"{setting}: expected it with allocator {of}, got {rule}")
        for setting in ("tolerance", "ratio"):
            if getattr(self, setting) is not None and self.budget.asked:
                raise ValueError(f"{setting}: expected either a {setting} or a budget, got both")
        if len(self.repair) > 1 and {"auto", "none"} & {*self.repair}:
            raise ValueError(f"repair: expected auto, none or other names, got {', '.join(self.repair)}")
        if self.polish_passes is not None and "polish" not in self.repair:
            raise ValueError(f"polish_passes: expected it with repair polish, got {', '.join(self.repair)}")
        return self

    @property
    def rule(self) -> str:
        """The allocator's name, or the default rule if none was given; it may be ``auto``."""
        of_tod = (self.tolerance, self.removal, self.protection)
        tries = self.granularity not in ("weight", "expert")
        if self.allocator is None and tries and of_tod == (None, None, None):
            return "auto"
        return self.single_rule

    @property
    def single_rule(self) -> str:
        """The allocator's name, or the default rule, for steps that cannot compare rules as ``auto`` does."""
        shared = dict.fromkeys(("unit+block", "unit+head_size+block"), "repair_aware")
        others = {"weight": "emp", "block": "global", **shared}
        return self.allocator or others.get(self.granularity, "tod")

    @property
    def repairs(self) -> str | list[str] | None:
        """The repairs in the form that `secateur.repair` accepts."""
        if self.repair in ((), ("none",)):
            return None
        return self.repair[0] if len(self.repair) == 1 else list(self.repair)
