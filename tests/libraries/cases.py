"""All cases."""

from __future__ import annotations

from tests.libraries import (
    audio_cases,
    diffusers_cases,
    other_cases,
    transformers_cases,
    vision_cases,
    yolo_cases,
)
from tests.libraries.case import Case

CASES: tuple[Case, ...] = (
    *yolo_cases.CASES,
    *diffusers_cases.CASES,
    *vision_cases.CASES,
    *transformers_cases.CASES,
    *audio_cases.CASES,
    *other_cases.CASES,
)


def case(name: str) -> Case:
    """The case with this name."""
    for candidate in CASES:
        if candidate.name == name:
            return candidate
    raise KeyError(f"expected one of {[c.name for c in CASES]}, got {name!r}.")
