"""Everything that a run can be asked to do, and what each setting means.

The one declaration that options, configuration files, their comments and their checks are made from. Plain
dataclasses, so that ``--help`` needs neither pydantic nor torch; `secateur.config.read` validates them.
"""

# ruff: noqa: RUF009 `option` is a dataclass field, which ruff cannot see

from __future__ import annotations

from dataclasses import dataclass

from secateur.config.names import (
    EXPERT_SIGNALS,
    REPAIRS,
    SIGNALS,
    Criterion,
    Form,
    Granularity,
    MaskRepair,
    MaskRule,
    Rule,
    Unrealisable,
)
from secateur.config.option import Bounds, Choices, option

Amount = int | float
_BUDGETS = ("macs", "params", "sparsity", "latency", "experts")
_SIGNAL = Choices(tuple(dict.fromkeys((*SIGNALS, *EXPERT_SIGNALS))), "*+")


@dataclass(frozen=True)
class BudgetSection:
    """What the result may cost; see `secateur.Budget`."""

    macs: Amount | None = option("MACs to keep: a fraction (0.5) or a count (1000000).")
    params: Amount | None = option("Parameters to keep: a fraction or a count.")
    sparsity: float | None = option(
        "Of single weights, the fraction that becomes zero, as 0.9.", bounds=Bounds(above=0, below=1)
    )
    latency: float | None = option(
        "Seconds of a forward pass to keep: a fraction of the dense ones, met by measuring on this machine.",
        bounds=Bounds(above=0, below=1),
    )
    experts: Amount | None = option("Of a mixture of experts, how many stay: a fraction (0.75) or a count.")
    spend: bool = option("Spend what the rule's knob leaves of the budget, unit by unit.", True)

    def __post_init__(self) -> None:
        """Checks the amounts."""
        for name in ("macs", "params", "experts"):
            value = getattr(self, name)
            if (isinstance(value, float) and not 0 < value < 1) or (isinstance(value, int) and value < 1):
                raise ValueError(
                    f"expected {name} to be a fraction in (0, 1) or a whole number of at least 1, got {value}"
                )

    @property
    def asked(self) -> dict[str, Amount]:
        """What was asked for, by name."""
        named = {name: getattr(self, name) for name in _BUDGETS}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class LimitsSection:
    """What must stay; see `secateur.Limits`."""

    round_to: int = option("Keep a multiple of this many units in each layer.", 1, bounds=Bounds(least=1))
    min_keep: int = option("Keep at least this many units in each layer.", 1, bounds=Bounds(least=1))
    max_ratio: float = option(
        "Remove at most this fraction of a layer.", 0.99, bounds=Bounds(least=0, below=1)
    )
    ignore: tuple[str, ...] = option("Leave groups of this name alone (* and ?).", ())


@dataclass(frozen=True)
class ImagesSection:
    """How the pictures of a folder become inputs."""

    size: int | None = option(
        "Height and width in pixels; the model's own if it says so, else 224.", bounds=Bounds(least=1)
    )
    mean: tuple[float, ...] | None = option("Subtracted from each channel of values in [0, 1].")
    std: tuple[float, ...] | None = option("Divides each channel after that.")


@dataclass(frozen=True)
class TextSection:
    """How a text becomes inputs."""

    tokenizer: str | None = option("Folder of the tokenizer; the model's own folder if not given.")
    length: int = option("Tokens of a sample.", 512, bounds=Bounds(least=1))


@dataclass(frozen=True)
class CompareSection:
    """What `secateur compare` compares."""

    rules: tuple[Rule, ...] = option(
        "Rules to compare.", ("repair_aware", "tod", "emp", "uniform", "global", "random")
    )
    macs: tuple[float, ...] = option(
        "Fractions of the dense MACs at which they are compared.",
        (0.8, 0.6, 0.4),
        bounds=Bounds(above=0, below=1),
    )
    plot: str | None = option("Draw accuracy against MACs into this file: .svg, .png or .pdf.")


@dataclass(frozen=True)
class CurveSection:
    """What `secateur tolerance` shows."""

    rows: int = option("Rows of the table, about evenly spaced in MACs.", 20, bounds=Bounds(least=2))
    plot: str | None = option("Draw the curve into this file: .svg, .png or .pdf.")


@dataclass(frozen=True)
class TransitionSection:
    """What `secateur transition` sweeps over."""

    rules: tuple[MaskRule, ...] = option(
        "Rules to compare.", ("uniform", "erk", "lamp", "emp", "repairability")
    )
    sparsities: tuple[float, ...] = option(
        "Fractions of the weights that go.",
        (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97),
        bounds=Bounds(above=0, below=1),
    )
    criterion: Criterion = option("Which weights of a layer go first.", "magnitude")
    repair: MaskRepair = option("What is done to every allocation alike.", "variance")
    share: float = option(
        "What of the dense model's accuracy counts as recovered.", 0.95, bounds=Bounds(above=0, most=1)
    )
    plot: str | None = option("Draw the curves into this file: .svg, .png or .pdf.")


@dataclass(frozen=True)
class Run:
    """A run of any command; each command reads its part."""

    model: str | None = option(
        "The model: package.module:function or file.py:function that returns it, timm:NAME, a Hugging Face "
        "folder, or a .pt2 file."
    )
    data: str | None = option(
        "Calibration data: module:function, .npz with arrays x and y, a folder of images with one folder a "
        "class, a Hugging Face dataset folder, or a .txt file."
    )
    evaluation: str | None = option(
        "Data that accuracy is measured on, as for data; else a held-out fifth of the data."
    )
    input: tuple[str, ...] = option(
        "Sizes of an input, 1x3x224x224 or 1x16:int64, where there is no data; one entry an input.",
        (),
        commas=False,
    )
    batch_size: int = option("Samples a batch, for data from files.", 64, bounds=Bounds(least=1))
    samples: int | None = option(
        "Of data from files, at most this many samples, drawn at random.", bounds=Bounds(least=2)
    )
    images: ImagesSection = option("How the pictures of a folder become inputs.", ImagesSection())
    text: TextSection = option("How a text becomes inputs.", TextSection())
    granularity: Granularity = option(
        "Channels, neurons and heads go, single weights become zero, or experts go.", "unit"
    )
    budget: BudgetSection = option("What the result may cost; empty lets the rule decide.", BudgetSection())
    allocator: Rule | None = option(
        "Rule for how much of each layer goes; auto, emp for single weights, tod for experts."
    )
    tolerance: float | None = option(
        "Of tod, without a budget; 0.1 if not given.", bounds=Bounds(least=0, most=1)
    )
    ratio: float | None = option(
        "Of uniform, without a budget: the fraction removed.", bounds=Bounds(least=0, below=1)
    )
    removal: str | None = option(
        "Signal whose lowest scores go first; the rule's own if not given.", choices=_SIGNAL
    )
    protection: str | None = option(
        "Of tod: signal whose highest scores are to stay; taylor if not given.", choices=_SIGNAL
    )
    steps: int = option(
        "Rounds of removal, repair and scoring anew; several need a budget.", 1, bounds=Bounds(least=1)
    )
    limits: LimitsSection = option("What must stay, whatever the rule decides.", LimitsSection())
    allow_inexact: bool = option("Also offer groups whose units an operator mixes.", False)
    repair: tuple[str, ...] = option(
        "What may undo damage, if it helps; several are done in order.", ("auto",), choices=Choices(REPAIRS)
    )
    form: Form = option("Of the result; auto is a module where that can be.", "auto")
    on_unrealisable: Unrealisable | None = option(
        "What form auto does about groups that no module can express: a captured program (what apply does if "
        "not given), or leave them whole (what prune does).",
    )
    signals: tuple[str, ...] = option(
        "What secateur score computes; what the rule needs if not given.", (), choices=_SIGNAL
    )
    checkpoint: str | None = option("File from which an interrupted scoring goes on.")
    memory: str | None = option("Most that scoring may hold, in bytes or as 2 GB.")
    scores: str | None = option("Table of scores: secateur score writes it, plan reads it.")
    plan: str | None = option("Plan: secateur plan writes it, apply reads it.")
    artefact: str | None = option("Folder of the result: prune and apply write it, repair reads it.")
    repaired: str | None = option("Folder that secateur repair writes.")
    seed: int = option("Of everything that draws: the same seed gives the same plan.", 0)
    compare: CompareSection = option("Of secateur compare.", CompareSection())
    curve: CurveSection = option("Of secateur tolerance.", CurveSection())
    transition: TransitionSection = option("Of secateur transition.", TransitionSection())

    def __post_init__(self) -> None:
        """Refuses settings that would do nothing."""
        rule = self.rule
        if self.ratio is not None and rule != "uniform":
            raise ValueError(f"ratio: expected it with allocator uniform, got {rule}")
        if self.tolerance is not None and rule != "tod":
            raise ValueError(f"tolerance: expected it with allocator tod, got {rule}")
        if self.protection is not None and rule != "tod":
            raise ValueError(f"protection: expected it with allocator tod, got {rule}")
        if self.tolerance is not None and self.budget.asked:
            raise ValueError("tolerance: expected either a tolerance or a budget, got both")
        if self.ratio is not None and self.budget.asked:
            raise ValueError("ratio: expected either a ratio or a budget, got both")
        if len(self.repair) > 1 and {"auto", "none"} & {*self.repair}:
            raise ValueError(f"repair: expected auto, none or other names, got {', '.join(self.repair)}")

    @property
    def rule(self) -> str:
        """The allocator's name, its default filled in."""
        of_tod = (self.tolerance, self.removal, self.protection)
        if self.allocator is None and self.granularity == "unit" and of_tod == (None, None, None):
            return "auto"
        return self.single_rule

    @property
    def single_rule(self) -> str:
        """The same for steps that take one rule; ``auto`` has to try several."""
        return self.allocator or ("emp" if self.granularity == "weight" else "tod")

    @property
    def repairs(self) -> str | list[str] | None:
        """The repairs as the library takes them."""
        if self.repair in ((), ("none",)):
            return None
        return self.repair[0] if len(self.repair) == 1 else list(self.repair)
