"""Load the model and data that a run's settings name, and make its rule, budget and limits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from secateur.cli.loading import ModelSource, example_of, load_data, model_source
from secateur.common.reading import read_bytes
from secateur.config.run import RULE_SETTINGS, Run
from secateur.errors import PlanError, SettingError

if TYPE_CHECKING:
    from torch import nn

    from secateur.allocators import Budget, Limits
    from secateur.allocators.registry import Allocates
    from secateur.calibration import Calibration
    from secateur.pipeline.auto.chooser import Chooser
    from secateur.plan import Plan
    from secateur.repairs.methods import Methods
    from secateur.targets.weights import MaskPlan


@dataclass(frozen=True)
class Inputs:
    """The model and the data of a run. Each is loaded on first use."""

    run: Run

    @cached_property
    def source(self) -> ModelSource:
        """The source of the model: it makes or loads it."""
        return model_source("--model", self.run.model or "")

    @cached_property
    def model(self) -> nn.Module:
        """The dense model, with its weights."""
        return self.placed(self.source.load())

    def placed(self, model: nn.Module) -> nn.Module:
        """Move a model to the run's device. One whose weights are in files stays; see `sc.compute_on`."""
        from secateur.common.computing import device_named
        from secateur.common.mapped import any_mapped

        device = self.run.device
        if device is None or any_mapped(model.parameters()):
            return model
        return model.to(device_named(device, f"--device {device}", "Leave it out to compute on the CPU."))

    @cached_property
    def data(self) -> Calibration:
        """The calibration data."""
        from secateur.calibration import Calibration

        # The model is needed to know which entries of a batch are its arguments, and which are labels.
        model = None if self.run.model is None else self.model
        return Calibration.of(self._read("--data", self.run.data or ""), views=self.run.views, model=model)

    @cached_property
    def graph(self) -> Any:
        """The trace of the model, in the run's granularity."""
        return self.traced(self.model)

    def traced(self, model: nn.Module) -> Any:
        """Trace a model in the run's granularity. Its weights may be missing."""
        import secateur as sc
        from secateur.pipeline.result import traced_on_few

        run = self.run

        def trace(example: Any) -> Any:
            call: Any = sc.trace
            return call(model, example, granularity=run.granularity, allow_inexact=run.allow_inexact)

        if run.granularity == "weight":
            return trace(None)
        if run.input or run.data is None or run.granularity == "expert":
            return trace(self.example)
        return traced_on_few(trace, self.data.first())

    @cached_property
    def evaluation(self) -> Calibration | None:
        """The data that accuracy is measured on; None if a part of `data` is used."""
        return None if self.run.evaluation is None else self._read("--evaluation", self.run.evaluation)

    @cached_property
    def held_out(self) -> Calibration | None:
        """The data that quality is measured on, to meet a bound on it; None if a part of `data` is used."""
        return None if self.run.held_out is None else self._read("--held-out", self.run.held_out)

    @cached_property
    def example(self) -> Any:
        """Example inputs: made from ``--input`` if given, otherwise the first batch of the data.

        Raises:
            SettingError: If neither is given.
        """
        if self.run.input:
            return tuple(example_of(text) for text in self.run.input)
        if self.run.data is None:
            raise SettingError(
                "inputs: expected --input or --data, got neither. Write --input 1x3x224x224, for example."
            )
        batch = self.data.first()
        return batch.inputs

    def _read(self, option: str, text: str) -> Calibration:
        from secateur.calibration import Calibration

        run = self.run
        found = load_data(
            option,
            text,
            batch_size=run.batch_size,
            seed=run.seed,
            samples=run.samples,
            images=run.images,
            texts=run.text,
            source=None if run.model is None else self.source,
        )
        return Calibration.of(found, seed=run.seed)


def repairs_of(run: Run) -> Methods:
    """Return the requested repairs; `polish` with its number of passes."""
    if run.polish_passes is None:
        return run.repairs
    from secateur.repairs.polish import Polish

    return [Polish(passes=run.polish_passes) if name == "polish" else name for name in run.repair]


def budget_of(run: Run) -> Budget | None:
    """Return the run's budget; None if it has none, so that the rule decides."""
    from secateur.allocators import Budget

    if not run.budget.asked:
        return None
    bounds: dict[str, Any] = run.budget.model_dump(exclude_none=True)
    return Budget(**bounds)


def limits_of(run: Run) -> Limits:
    """Return the run's limits: what it sets, and the granularity's defaults."""
    from dataclasses import replace

    from secateur.allocators.limits import DEFAULTS, Limits

    given = {name: getattr(run.limits, name) for name in run.limits.model_fields_set}
    return replace(DEFAULTS.get(run.granularity, Limits()), **given)


def read_plan(path: str) -> Plan | MaskPlan:
    """Read a plan of any granularity: JSON, or the safetensors file of masks."""
    import secateur as sc

    if not path.lstrip().startswith("{"):
        start = read_bytes(path, 8, f"plan {path!r}", PlanError, "a plan", first=8)
        if b"\0" in start:  # the upper bytes of a length are zero; a text has no such byte
            return sc.MaskPlan.load(path)
    return sc.Plan.from_json(path)


def rule_of(run: Run) -> Allocates | Chooser:
    """Return the run's allocator with its settings, or what chooses one, such as `Auto`.

    Raises:
        SettingError: If a required setting is missing, or the allocator does not have a given setting.
    """
    from secateur.pipeline.auto.choosers import chooser_of

    chooser = chooser_of(run.rule)
    if chooser is not None and run.removal is not None:
        raise SettingError(
            f"--removal: expected a single rule, got allocator {run.rule}, whose candidates have signals of "
            "their own. Leave it out, or name a rule."
        )
    return chooser or single_rule_of(run)


def single_rule_of(run: Run) -> Allocates:
    """Return the run's allocator with its settings, for steps that cannot compare rules.

    Raises:
        SettingError: If the rule is ``auto`` or ``search``; and as in `rule_of`.
    """
    from secateur.pipeline.auto.choosers import CHOOSERS

    name = run.single_rule
    if name in CHOOSERS:
        raise SettingError(
            f"--allocator {name}: expected a single rule, because this step cannot compare rules. Use "
            "secateur prune, or name a single rule."
        )
    if name == "uniform" and run.ratio is None and not run.budget.asked:
        raise SettingError("--ratio: expected either a ratio or a budget for uniform, got neither. Give one.")
    return rule_called(run, name)


def rule_or_chooser(run: Run, name: str) -> Allocates | Chooser:
    """Return the allocator with this name, or the chooser, such as ``auto``; see `rule_called`."""
    from secateur.pipeline.auto.choosers import chooser_of

    return chooser_of(name) or rule_called(run, name)


def rule_called(run: Run, name: str) -> Allocates:
    """Return the allocator of this name, with the run's signals. The run's own rule also gets its knob.

    Raises:
        SettingError: If the allocator does not have one of the given settings.
    """
    from dataclasses import fields, replace

    from secateur.pipeline.options import TARGETS

    found = TARGETS[run.granularity].rule(name)
    settings: dict[str, Any] = {"removal": run.removal} if name != "random" else {}
    if name == run.single_rule:
        settings |= {setting: getattr(run, setting) for setting in RULE_SETTINGS}
    given = {setting: value for setting, value in settings.items() if value is not None}
    unknown = sorted(set(given) - {each.name for each in fields(found)})
    if unknown:
        raise SettingError(
            f"--{unknown[0]}: expected a setting of allocator {name}, got one of another allocator. "
            "Leave it out."
        )
    rule: Allocates = replace(found, **given)
    return rule
