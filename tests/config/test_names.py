"""The names that are written down for the command line are those that the library knows."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

from secateur import allocators as allocate
from secateur.allocators import registry
from secateur.config import names
from secateur.config.sections import CompareSection
from secateur.measure.latency.backends import BACKENDS
from secateur.pipeline.auto.choosers import CHOOSERS
from secateur.pipeline.targets.units import Units
from secateur.repairs.methods import REPAIRS
from secateur.signals.blocks import SIGNALS as BLOCK_SIGNALS
from secateur.signals.experts import SIGNALS as EXPERT_SIGNALS
from secateur.signals.registry import SIGNALS
from secateur.signals.weights.score import CRITERIA
from secateur.targets.experts.repair import REPAIRS as EXPERT_REPAIRS
from secateur.targets.units.apply import FORMS
from secateur.targets.weights.transition import REPAIRS as MASK_REPAIRS


def test_names_are_the_librarys() -> None:
    assert set(get_args(names.Rule)) == {*CHOOSERS, *allocate.names()}
    assert set(get_args(names.MaskRule)) == {name for name, rule in registry.RULES.items() if rule.on_weights}
    assert set(get_args(names.Form)) == set(FORMS)
    assert set(get_args(names.Criterion)) == set(CRITERIA)
    assert set(get_args(names.MaskRepair)) == set(MASK_REPAIRS)
    assert set(names.SIGNALS) == set(SIGNALS)
    assert set(names.EXPERT_SIGNALS) == set(EXPERT_SIGNALS)
    assert set(names.BLOCK_SIGNALS) == set(BLOCK_SIGNALS)
    assert set(names.REPAIRS) == {*REPAIRS, *EXPERT_REPAIRS, "surgeon", "auto", "none"}
    assert CompareSection().rules == Units.compared
    assert set(get_args(names.Backend)) == {*BACKENDS, "onnx"}
    assert set(allocate.budget.BACKENDS) == set(BACKENDS)


def test_sections_hold_the_librarys_defaults() -> None:
    from secateur.config.run import Run
    from secateur.config.sections import BudgetSection, LimitsSection

    limits = LimitsSection()
    assert allocate.Limits() == allocate.Limits(
        limits.round_to, limits.min_keep, limits.max_ratio, limits.ignore
    )
    assert allocate.Budget(macs=0.5) == allocate.Budget(**BudgetSection(macs=0.5).model_dump())
    assert {*BudgetSection.model_fields} == {field.name for field in fields(allocate.Budget)}
    assert Run().rule == "auto"
    assert Run().single_rule == Run(removal="l1").rule == Run(granularity="expert").rule == "tod"
    assert Run(granularity="weight").rule == "emp"
    assert Run(granularity="block").rule == "auto"
    assert Run(granularity="block").single_rule == "global"
    for several in ("unit,block", "block+unit", ["block", "unit"]):
        run = Run.model_validate({"granularity": several})
        assert (run.granularity, run.rule, run.single_rule) == ("unit+block", "auto", "repair_aware")
