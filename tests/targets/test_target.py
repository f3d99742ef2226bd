"""Every granularity takes the same options, or refuses them by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import secateur as sc
from secateur.pipeline.options import TARGETS
from secateur.targets.granularity import UNITS

OPTIONS: dict[str, Any] = {
    "steps": 2,
    "allow_inexact": True,
    "on_unrealisable": "graph",
    "measure_latency": True,
}
BUDGETS = {"latency": sc.Budget(latency=0.5), "memory": sc.Budget(memory=0.5)}


class Unread:
    """Data that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("read")


@pytest.mark.parametrize(("name", "option"), [(n, o) for n, kind in TARGETS.items() for o in kind.refused])
def test_an_option_without_a_meaning_is_refused_before_data_is_read(name: Any, option: str) -> None:
    settings = {option: OPTIONS[option]} if option in OPTIONS else {}
    budget = BUDGETS.get(option, sc.Budget(macs=0.5))
    said = f"{option}={settings[option]!r}" if settings else f"{option}="
    with pytest.raises(sc.SettingError, match=rf"{said}.* with granularity '{re.escape(name)}'"):
        sc.prune(nn.Linear(2, 2), Unread(), budget, granularity=name, **settings)


def test_units_take_every_option() -> None:
    units = {name for name in UNITS if "rank" not in name}  # directions cannot go in steps
    assert {name for name, kind in TARGETS.items() if not kind.refused} == units
    assert all(set(kind.refused) <= {*OPTIONS, *BUDGETS} for kind in TARGETS.values())


@pytest.mark.parametrize("name", TARGETS)
def test_a_form_that_results_do_not_have_is_refused(name: Any) -> None:
    with pytest.raises(sc.SettingError, match=rf"expected one of {', '.join(TARGETS[name].forms)} with"):
        sc.prune(nn.Linear(2, 2), Unread(), None, granularity=name, form="sliced")  # type: ignore[arg-type]
