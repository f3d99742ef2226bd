"""Write and run ``.pt2``: PyTorch's archive of a captured program. It loads without the model's code."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.artefact.export.capturing import Captured
from secateur.artefact.export.checking import Runs
from secateur.errors import ArtefactError
from secateur.targets.units.record import record_of

ABOUT = "secateur.json"


def about(model: nn.Module) -> dict[str, str]:
    """Return the origin of a model as texts by name: versions and, if it was pruned, rule and costs."""
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


def write_program(captured: Captured, path: Path) -> None:
    """Write the program. ``torch.export.load(path).module()`` runs it, on the device of the capture.

    It goes through memory: torch ends the process where a disk is full.
    """
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own internals
        torch.export.save(captured.program, made, extra_files={ABOUT: json.dumps(about(captured.model))})
    path.write_bytes(made.getbuffer())


def program_runner(path: Path) -> Runs:
    """Return a function that runs a file that `write_program` wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()

    def runs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [v for v in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(v, torch.Tensor)]

    return runs
