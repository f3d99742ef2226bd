"""Numbers of experts in attributes and configurations, after some experts were removed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.plan import Plan
from secateur.targets.experts.blocks import Block, counts_in
from secateur.targets.experts.graph import ExpertGraph


def new_counts(model: nn.Module, graph: ExpertGraph, plan: Plan) -> dict[str, int]:
    """Paths of attributes and configuration fields with the number of experts that is left.

    What a single block says follows that block. What the model or a configuration says follows where all
    blocks had that number and keep the same number; otherwise no single number is true, and it stays.
    """
    kept = {group.name: group.kept for group in plan.groups}
    found = {attribute: kept[block.name] for block in graph.blocks for attribute in block.attributes}
    before = {block.count for block in graph.blocks} | {left.group.size for left in graph.left}
    after = {kept[block.name] for block in graph.blocks} | {left.group.size for left in graph.left}
    if len(before) != 1 or len(after) != 1:
        return found
    (old,), (new,) = before, after
    for path in _paths_with_counts(model, graph):
        owner: Any = model
        for part in path.split(".") if path else []:
            owner = getattr(owner, part)
        for name in counts_in(owner, old):
            found[f"{path}.{name}" if path else name] = new
    return found


def _paths_with_counts(model: nn.Module, graph: ExpertGraph) -> list[str]:
    """Paths of the modules around the blocks, and of configurations: the model's, and those inside it."""
    around = {"", *(b.name.rpartition(".")[0] for b in graph.blocks)}
    while any(path for path in around if path.rpartition(".")[0] not in around):
        around |= {path.rpartition(".")[0] for path in around}
    found = sorted(around)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "__dict__"):
        found.append("config")
        found += [
            f"config.{name}"
            for name, v in vars(config).items()
            if re.search("config$", name) and hasattr(v, "__dict__")
        ]
    return found


def keep_masks(block: Block, removed: list[int]) -> dict[str, NDArray[np.bool_]]:
    """The mask of one block that loses these experts."""
    mask = np.ones(block.count, dtype=np.bool_)
    mask[removed] = False
    return {block.name: mask}
