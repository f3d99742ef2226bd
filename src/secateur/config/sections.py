"""The sections of a run's settings, each a table of a configuration file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.config.names import Backend, Criterion, MaskRepair, MaskRule, Rule
from secateur.config.values import Amount, Listed, Share


class Settings(BaseModel):
    """Settings that belong together. They cannot be changed, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class BudgetSection(Settings):
    """What the result may cost; see `secateur.Budget`."""

    macs: Amount | None = Field(
        default=None, description="MACs to keep: a fraction (0.5) or a count (1000000).", examples=[0.5]
    )
    params: Amount | None = Field(
        default=None, description="Parameters to keep: a fraction or a count.", examples=[0.5]
    )
    sparsity: Share | None = Field(
        default=None,
        description="Fraction of single weights to set to zero, for example 0.9.",
        examples=[0.9],
    )
    latency: str | None = Field(
        default=None,
        description="Most time of a forward pass: a fraction of the dense one (0.6) or a time (30 ms), "
        "measured on this machine.",
        examples=["30 ms"],
    )
    memory: str | None = Field(
        default=None,
        description="Most memory for weights, activations at their peak and the cache of tokens: a fraction "
        "(0.6) or a size (512 MB).",
        examples=["512 MB"],
    )
    accuracy_drop: str | None = Field(
        default=None,
        description="The most that the accuracy may drop: 1% or 0.01 is one point. The result is the "
        "cheapest model for which held-out data confirm this.",
        examples=["1%"],
    )
    loss_rise: str | None = Field(
        default=None,
        description="The most that the mean loss may rise, as a fraction of the dense one: 5% or 0.05.",
        examples=["5%"],
    )
    perplexity_rise: str | None = Field(
        default=None,
        description="The most that exp(mean loss) may rise, the perplexity of a language model: 5% or 0.05.",
        examples=["5%"],
    )
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="Number of tokens in the key-value cache, for the bound on memory.",
        examples=[4096],
    )
    batch: int | None = Field(
        default=None,
        ge=1,
        description="Number of samples in the measured pass; by default that of the first batch.",
        examples=[1],
    )
    device: str | None = Field(
        default=None,
        description="Device on which latency and memory are measured; by default the model's.",
        examples=["cuda"],
    )
    backend: Backend = Field(default="eager", description="Back end that runs the timed models.")
    confidence: float = Field(
        default=0.95, ge=0.5, lt=1, description="Confidence with which a bound on quality must hold."
    )
    experts: Amount | None = Field(
        default=None,
        description="Experts to keep: a fraction (0.75) or a count.",
        examples=[0.75],
    )
    blocks: Amount | None = Field(
        default=None,
        description="Residual blocks to keep: a fraction (0.75) or a count.",
        examples=[0.75],
    )
    spend: bool = Field(
        default=True,
        description="Spend the rest of the budget by keeping more units than the rule's knob does.",
    )

    @property
    def asked(self) -> dict[str, Any]:
        """The given bounds by name, without settings on how they are measured."""
        how = {"spend", "tokens", "batch", "device", "backend", "confidence"}
        return self.model_dump(exclude_none=True, exclude=how)


class LimitsSection(Settings):
    """Limits on what may be removed; see `secateur.Limits`."""

    round_to: Annotated[int, Field(ge=1)] | Literal["measured"] = Field(
        default=1,
        description="Number of kept units in each layer is a multiple of this; measured: the fastest one.",
    )
    min_keep: int = Field(default=1, ge=1, description="Keep at least this many units in each layer.")
    max_ratio: float = Field(default=0.99, ge=0, lt=1, description="Remove at most this fraction of a layer.")
    ignore: Listed[str] = Field(
        default=(),
        description="Names of groups that are not pruned; * and ? are allowed.",
        examples=[("stem",)],
    )


class ImagesSection(Settings):
    """How the pictures of a folder become inputs."""

    size: int | None = Field(
        default=None,
        ge=1,
        description="Height and width in pixels; by default the model's own, if known, or 224.",
        examples=[224],
    )
    mean: Listed[float] | None = Field(
        default=None,
        description="Subtracted from each channel of values in [0, 1].",
        examples=[(0.485, 0.456, 0.406)],
    )
    std: Listed[float] | None = Field(
        default=None, description="Divides each channel after that.", examples=[(0.229, 0.224, 0.225)]
    )


class TextSection(Settings):
    """How a text becomes inputs."""

    tokenizer: str | None = Field(
        default=None,
        description="Folder of the tokenizer; by default the model's own folder.",
        examples=["folder"],
    )
    length: int = Field(default=512, ge=1, description="Number of tokens in a sample.")


class CompareSection(Settings):
    """What `secateur compare` compares."""

    rules: Listed[Rule] = Field(
        default=("repair_aware", "tod", "emp", "uniform", "global", "random"),
        description="Rules to compare. Single weights and experts have other defaults.",
    )
    macs: Listed[Share] = Field(
        default=(0.8, 0.6, 0.4),
        description="Fractions of the dense MACs to compare at, if no other budget is given.",
    )
    sparsities: Listed[Share] = Field(
        default=(), description="Fractions of single weights that become zero.", examples=[(0.5, 0.7, 0.9)]
    )
    experts: Listed[Share] = Field(
        default=(), description="Fractions of the experts to keep.", examples=[(0.75, 0.5)]
    )
    plot: str | None = Field(
        default=None,
        description="Draw accuracy against MACs into this file: .svg, .png or .pdf.",
        examples=["compare.svg"],
    )


class CurveSection(Settings):
    """What `secateur tolerance` shows."""

    rows: int = Field(default=20, ge=2, description="Rows of the table, about evenly spaced in MACs.")
    plot: str | None = Field(
        default=None, description="Draw the curve into this file: .svg, .png or .pdf.", examples=["curve.svg"]
    )


class TransitionSection(Settings):
    """What `secateur transition` sweeps over."""

    rules: Listed[MaskRule] = Field(
        default=("uniform", "erk", "lamp", "emp", "repairability"), description="Rules to compare."
    )
    sparsities: Listed[Share] = Field(
        default=(0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97),
        description="Fractions of the weights that are removed.",
    )
    criterion: Criterion = Field(
        default="magnitude", description="Score of single weights; the lowest are removed first."
    )
    repair: MaskRepair = Field(default="variance", description="Repair that is applied to every allocation.")
    share: float = Field(
        default=0.95, gt=0, le=1, description="Part of the dense model's accuracy that counts as recovered."
    )
    plot: str | None = Field(
        default=None,
        description="Draw the curves into this file: .svg, .png or .pdf.",
        examples=["transition.svg"],
    )
