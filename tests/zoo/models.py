"""The architectures that the library must trace, prune and verify, with random weights."""

from __future__ import annotations

from tests.zoo import plain_models, timm_models, torchvision_models, transformers_models
from tests.zoo.entry import Entry

ENTRIES: tuple[Entry, ...] = (*torchvision_models.AT_224, *timm_models.AT_224)
"""Convolutional networks at 224 pixels, which other engines can be timed on as well."""

ZOO: tuple[Entry, ...] = (
    *ENTRIES,
    *torchvision_models.MODELS,
    *timm_models.MODELS,
    *transformers_models.MODELS,
    *plain_models.MODELS,
)
"""All of them; look one up by name with `entry`."""


def entry(name: str) -> Entry:
    """The entry with this name."""
    for candidate in ZOO:
        if candidate.name == name:
            return candidate
    raise KeyError(f"zoo: expected one of {[e.name for e in ZOO]}, got {name!r}.")
