"""``.pt2``: PyTorch's own archive of a captured program, which loads without the code that made the model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from secateur.export.about import about
from secateur.export.capturing import Captured
from secateur.export.checking import Runs

ABOUT = "secateur.json"


def write_program(captured: Captured, path: Path) -> None:
    """Write the program; ``torch.export.load(path).module()`` runs it, on the device it was captured on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own internals
        torch.export.save(captured.program, path, extra_files={ABOUT: json.dumps(about(captured.model))})


def program_runner(path: Path) -> Runs:
    """Runs a file that `write_program` wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()

    def runs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [v for v in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(v, torch.Tensor)]

    return runs
