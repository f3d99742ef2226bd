"""What `prune` and `compare` may be asked for: granularities, and the options that each has."""

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
"""What may be removed, by the name of its granularity."""


def target_called(function: str, granularity: str) -> type[Target]:
    """What is removed.

    Raises:
        SettingError: There is no granularity of this name.
    """
    if granularity not in TARGETS:
        known = ", ".join(map(repr, TARGETS))
        raise SettingError(
            f"{function}(granularity={granularity!r}): expected {known}, or a list of what + joins."
        )
    return TARGETS[granularity]


def check_bounds(function: str, granularity: str, budget: Budget | None) -> None:
    """Refuses bounds that a granularity does not have.

    Raises:
        SettingError: If one means nothing there.
    """
    kind = target_called(function, granularity)
    for name in () if budget is None else budget.measured:
        if name in kind.refused:
            raise refusal(f"{function}(budget=Budget({name}=...))", granularity, kind.refused[name])


_UNSET = {"steps": 1, "allow_inexact": False, "on_unrealisable": "leave", "measure_latency": False}


def check_options(function: str, granularity: str, form: str, **options: Any) -> None:
    """Refuses a form and options that a granularity does not have.

    Args:
        function: For messages.
        granularity: What is removed.
        form: The form that was asked for.
        options: Further options by name.

    Raises:
        SettingError: If one means nothing there.
    """
    kind = TARGETS[granularity]
    if form not in kind.forms:
        raise SettingError(
            f"{function}(form={form!r}): expected one of {', '.join(kind.forms)} with granularity "
            f"{granularity!r}."
        )
    for name, value in options.items():
        if value != _UNSET[name] and name in kind.refused:
            raise refusal(f"{function}({name}={value!r})", granularity, kind.refused[name])


def check_quality(
    budget: Budget | None, held_out: Any, metric: Metric | None, frontier: Sequence[float] | None
) -> None:
    """Refuse what is about quality where none is bounded or measured, and a frontier of no shares.

    Raises:
        SettingError: It means nothing here.
    """
    if frontier is not None and (
        isinstance(frontier, str)
        or not isinstance(frontier, Iterable)
        or not all(isinstance(s, float) and 0 < s < 1 for s in frontier)
    ):
        raise SettingError(
            f"prune(frontier={frontier!r}): expected shares of the cost, floats in (0, 1). Write "
            "(0.9, 0.8, 0.7)."
        )
    if metric is not None and not callable(metric):
        raise SettingError(
            f"prune(metric={metric!r}): expected a function of a model and a batch. Pass one, or none."
        )
    if frontier or (budget is not None and budget.quality):
        return
    for name, value in (("held_out", held_out), ("metric", metric)):
        if value is not None:
            raise SettingError(
                f"prune({name}=...): expected it together with a bound on quality or a frontier, got "
                "neither. Pass Budget(accuracy_drop=0.01), for example, or leave it out."
            )


def checked_kind(
    granularity: str,
    form: str,
    budget: Budget | None,
    steps: int,
    allow_inexact: bool,
    on_unrealisable: str,
    measure_latency: bool | None,
) -> type[Target]:
    """What is removed; refuses options that are wrong, or that it does not have."""
    kind = target_called("prune", granularity)
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
                f"prune(steps={steps}): expected a budget of macs or params, or of experts, got {name}. "
                "Leave steps out."
            )
    check_bounds("prune", granularity, budget)
    if type(steps) is not int or steps < 1 or (steps > 1 and budget is None):
        raise SettingError(
            f"prune(steps={steps!r}): expected a number of rounds of at least 1, and for several a budget. "
            "Pass these, or leave steps out."
        )
    if on_unrealisable not in ("graph", "leave"):
        raise SettingError(f"prune(on_unrealisable={on_unrealisable!r}): expected 'graph' or 'leave'.")
    return kind
