from __future__ import annotations

from typing import Any

import pytest

from secateur.allocators import Global, ToD, Uniform, names, resolve
from secateur.errors import SettingError


def test_names() -> None:
    assert names() == (
        "emp",
        "erk",
        "flap",
        "global",
        "lamp",
        "owl",
        "random",
        "ratios",
        "repair_aware",
        "repairability",
        "tod",
        "uniform",
    )
    assert resolve("tod") == ToD()
    assert resolve("uniform") == Uniform()
    assert resolve("random") == Uniform(removal="random")
    assert resolve("flap") == Global(normalise="zscore", removal="fluctuation")
    named = set(names()) - {"random", "flap"}
    assert all(resolve(name).name == name for name in named)  # type: ignore[attr-defined]


def test_an_instance_is_taken_as_it_is() -> None:
    class Own:
        signals = ("magnitude",)

        def allocate(
            self, graph: Any, scores: Any, budget: Any = None, limits: Any = None, seed: int = 0
        ) -> Any:
            return None

    own: Any = Own()
    assert resolve(own) is own
    rule = ToD(tolerance=0.25)
    assert resolve(rule) is rule


def test_an_unknown_name() -> None:
    with pytest.raises(SettingError, match=r"allocator: expected one of 'emp', .*, 'uniform', got 'ToD'"):
        resolve("ToD")


@pytest.mark.parametrize("thing", [ToD, None, 3, object()])
def test_no_allocator(thing: Any) -> None:
    with pytest.raises(SettingError, match=r"allocator: expected a name \('emp', .*\) or an object with"):
        resolve(thing)
