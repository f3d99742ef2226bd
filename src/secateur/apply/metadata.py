"""What a model says of itself beside its layers: timm's feature table, Hugging Face's configuration.

Neither is read by the forward pass, so a forward pass cannot prove them; each is updated only where
something else can.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.graph.graph import Graph

_TRIALS = 16
"""How many combinations of fields of each size are tried."""


def new_metadata(
    model: nn.Module, small: nn.Module, graph: Graph, slots: NDArray[np.bool_]
) -> dict[str, int]:
    """Paths of numbers in feature tables and configurations, with their new values.

    Args:
        model: The dense model.
        small: The smaller module.
        graph: The trace.
        slots: Which units stay. [slots]
    """
    features = _feature_info(model, graph, slots)
    return {**features, **_num_features(model, small, features), **_config(model, small)}


def _feature_info(model: nn.Module, graph: Graph, slots: NDArray[np.bool_]) -> dict[str, int]:
    """timm's table of feature maps: `num_chs` of each is read off what its module returns."""
    table = getattr(model, "feature_info", None)
    prefix, entries = (
        ("feature_info", table)
        if isinstance(table, list)
        else ("feature_info.info", getattr(table, "info", ()))
    )
    found = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("num_chs"), int):
            continue
        new = _width_after(graph, slots, str(entry.get("module", "")), entry["num_chs"])
        if new is not None and new != entry["num_chs"]:
            found[f"{prefix}.{number}.num_chs"] = new
    return found


def _width_after(graph: Graph, slots: NDArray[np.bool_], module: str, width: int) -> int | None:
    """How many of the `width` channels that a module returns stay."""
    last = None
    for node in graph.program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any(path == module for path, _ in stack.values()):
            last = node
    axes = graph.walk.values.get(last) if last is not None else None
    if not module or not isinstance(axes, tuple):
        return None
    for axis in (*axes[1:2], *axes[-1:]):
        if len(axis) == width:
            return int(graph.kept_along(axis, slots).sum())
    return None


def _num_features(model: nn.Module, small: nn.Module, features: Mapping[str, int]) -> dict[str, int]:
    """timm's `num_features` and `head_hidden_size`: the classifier's input, or the last map's width."""
    classifier = getattr(model, "get_classifier", None)
    if not callable(classifier) or not isinstance(before := classifier(), nn.Linear):
        return {}
    after = small.get_classifier()  # type: ignore[operator]
    table = getattr(model, "feature_info", None)
    widths = {before.in_features: after.in_features}
    if isinstance(table, list) and table and f"feature_info.{len(table) - 1}.num_chs" in features:
        widths.setdefault(table[-1]["num_chs"], features[f"feature_info.{len(table) - 1}.num_chs"])
    found = {}
    for name in ("num_features", "head_hidden_size"):
        old = getattr(model, name, None)
        if isinstance(old, int) and widths.get(old, old) != old:
            found[name] = widths[old]
    return found


def _config(model: nn.Module, small: nn.Module) -> dict[str, int]:
    """Fields of a configuration from which a model of the pruned shapes can be made.

    That takes equal sizes in all layers. Candidates are widths whose value is the old size of an axis,
    and head counts that shrink in an axis' proportion. The model class, built without data from the
    changed configuration, must then have exactly the pruned tensors. The smallest such change is taken: a
    field that no shape shows, as the heads of some models, stays.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {}
    wanted = {name: tuple(t.shape) for name, t in small.state_dict().items()}
    shrunk = {
        (int(old), int(new))
        for name, tensor in model.state_dict().items()
        for old, new in zip(tensor.shape, wanted.get(name, ()), strict=False)
        if old != new
    }
    candidates = {}
    for field, value in vars(config).items():
        options = _options(field, value, shrunk)
        if len(options) == 1:
            candidates[field] = options.pop()
    for count in range(1, len(candidates) + 1):
        for fields in list(itertools.combinations(candidates, count))[:_TRIALS]:
            changes = {field: candidates[field] for field in fields}
            if _shapes_from(model, config, changes) == wanted:
                return {f"config.{field}": value for field, value in changes.items()}
    return {}


def configuration_fits(model: nn.Module) -> bool:
    """Whether the model's class, built from its configuration alone, has the model's shapes."""
    config = getattr(model, "config", None)
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return config is not None and _shapes_from(model, config, {}) == own


def _options(field: str, value: Any, shrunk: set[tuple[int, int]]) -> set[int]:
    """What a field may have become."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        return set()
    if re.search("intermediate|ffn|inner|d_ff|hidden_dim", field):
        return {new for old, new in shrunk if old == value}
    if "head" in field:
        return {value * new // old for old, new in shrunk if old % value == 0 and value * new % old == 0}
    return set()


def _shapes_from(
    model: nn.Module, config: Any, changes: Mapping[str, int]
) -> dict[str, tuple[int, ...]] | None:
    trial = copy.deepcopy(config)
    for field, value in changes.items():
        setattr(trial, field, value)
    try:
        with torch.device("meta"):
            built = type(model)(trial)
    except Exception:  # the configuration cannot express it, or the class takes more than it
        return None
    return {name: tuple(t.shape) for name, t in built.state_dict().items()}
