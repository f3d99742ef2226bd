"""What a file says of where it comes from."""

from __future__ import annotations

from importlib import metadata

from torch import nn

from secateur.apply.record import record_of
from secateur.errors import ArtefactError


def about(model: nn.Module) -> dict[str, str]:
    """Names and values, all text: versions, the rule, and what was removed, as far as the model knows."""
    found = {"secateur": metadata.version("secateur"), "model": type(model).__name__}
    try:
        record = record_of(model)
    except ArtefactError:  # a model that was not pruned may be exported too
        return found
    plan = record.plan
    found |= {"form": record.form, "allocator": plan.allocator, "note": record.note}
    for name in ("params", "macs"):
        found[name] = str(getattr(plan.predicted, name))
        found[f"dense_{name}"] = str(getattr(plan.dense, name))
    return {name: value for name, value in found.items() if value}
