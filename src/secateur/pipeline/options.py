"""The granularities of `prune` and `compare`, and checks of the options that each of them takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from secateur.allocators import Budget
from secateur.errors import SettingError
from secateur.measure.quality import Metric
from secateur.pipeline.targets.blocks import Blocks
from secateur.pipeline.targets.experts import Experts
from secateur.pipeline.targets.headsizes import HeadSizes, UnitsAndHeadSizes
from secateur.pipeline.targets.ranks import Ranks, UnitsAndRanks
from secateur.pipeline.targets.target import Target
from secateur.pipeline.targets.together import UnitsAndBlocks, UnitsAndExperts, UnitsHeadSizesAndBlocks
from secateur.pipeline.targets.units import Units
from secateur.pipeline.targets.weights import SingleWeights
from secateur.targets.granularity import refusal

TARGETS: Mapping[str, type[Target]] = MappingProxyType(
    {
        "unit": Units,
        "weight": SingleWeights,
        "expert": Experts,
        "unit+expert": UnitsAndExperts,
        "block": Blocks,
        "unit+block": UnitsAndBlocks,
        "head_size": HeadSizes,
        "unit+head_size": UnitsAndHeadSizes,
        "unit+head_size+block": UnitsHeadSizesAndBlocks,
        "rank": Ranks,
        "unit+rank": UnitsAndRanks,
    }
)
"""The target of each granularity, by the name that users pass."""


def target_class(function: str, granularity: str) -> type[Target]:
    """Return the target class of a granularity.

    Raises:
        SettingError: There is no granularity of this name.
    """
    if granularity not in TARGETS:
        known = ", ".join(map(repr, TARGETS))
        raise SettingError(
            f"{function}(granularity={granularity!r}): expected one of {known}, got another. Name "
            "one of these, or pass a list of the parts that + joins."
        )
    return TARGETS[granularity]


def check_bounds(function: str, granularity: str, budget: Budget | None) -> None:
    """Check that a granularity supports the measured bounds of a budget.

    Raises:
        SettingError: It does not support one of them.
    """
    target = target_class(function, granularity)
    for name in () if budget is None else budget.measured:
        if name in target.refused:
            raise refusal(f"{function}(budget=Budget({name}=...))", granularity, target.refused[name])


_UNSET = {"steps": 1, "allow_inexact": False, "on_unrealisable": "leave", "measure_latency": False}


def check_options(function: str, granularity: str, form: str, **options: Any) -> None:
    """Check that a granularity supports a form and options.

    Args:
        function: For messages.
        granularity: What is removed.
        form: The requested form.
        options: Further options by name.

    Raises:
        SettingError: The granularity does not support one of them.
    """
    target = TARGETS[granularity]
    if form not in target.forms:
        raise SettingError(
            f"{function}(form={form!r}): expected one of {', '.join(target.forms)} with granularity "
            f"{granularity!r}, got another. Name one of these."
        )
    for name, value in options.items():
        if value != _UNSET[name] and name in target.refused:
            raise refusal(f"{function}({name}={value!r})", granularity, target.refused[name])


def check_quality(
    budget: Budget | None, held_out: Any, metric: Metric | None, frontier: Sequence[float] | None
) -> None:
    """Check `frontier`, and the options that only a bound on quality or a frontier uses.

    Raises:
        SettingError: An option has a wrong value, or would have no effect.
    """
    if frontier is not None and (
        isinstance(frontier, str)
        or not isinstance(frontier, Iterable)
        or not all(isinstance(s, float) and 0 < s < 1 for s in frontier)
    ):
        raise SettingError(
            f"prune(frontier={frontier!r}): expected shares of the cost, floats in (0, 1), got something "
            "else. Write (0.9, 0.8, 0.7), for example."
        )
    if metric is not None and not callable(metric):
        raise SettingError(
            f"prune(metric={metric!r}): expected a function metric(model, batch), got "
            f"{type(metric).__name__}. Pass a function, or leave metric out."
        )
    if frontier or (budget is not None and budget.quality):
        return
    for name, value in (("held_out", held_out), ("metric", metric)):
        if value is not None:
            raise SettingError(
                f"prune({name}=...): expected it together with a bound on quality or a frontier, got "
                "neither. Pass Budget(accuracy_drop=0.01), for example, or leave it out."
            )


def checked_target_class(
    granularity: str,
    form: str,
    budget: Budget | None,
    steps: int,
    allow_inexact: bool,
    on_unrealisable: str,
    measure_latency: bool | None,
) -> type[Target]:
    """Check the options of `prune`, and return the target class of the granularity."""
    target = target_class("prune", granularity)
    check_options(
        "prune",
        granularity,
        form,
        steps=steps,
        allow_inexact=allow_inexact,
        on_unrealisable=on_unrealisable,
        measure_latency=bool(measure_latency),
    )
    for name in budget.measured if budget is not None else ():
        if steps != 1:
            raise SettingError(
                f"prune(steps={steps}): expected a budget of macs, params or experts, got {name}. "
                "Leave steps out."
            )
    check_bounds("prune", granularity, budget)
    if type(steps) is not int or steps < 1 or (steps > 1 and budget is None):
        raise SettingError(
            f"prune(steps={steps!r}): expected at least 1 round, and a budget if there are several. "
            "Pass both, or leave steps out."
        )
    if on_unrealisable not in ("graph", "leave"):
        raise SettingError(
            f"prune(on_unrealisable={on_unrealisable!r}): expected 'graph' or 'leave', got another value. "
            "Pass one of these."
        )
    return target
