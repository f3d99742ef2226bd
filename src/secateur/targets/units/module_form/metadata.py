"""Sizes that a model states outside its layers: timm's feature table and Hugging Face's configuration.

The forward pass may not read them, so a correct output does not prove them correct. Each number changes only
where something else shows its new value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.common.models import device_of, evaluating
from secateur.graph.graph import Graph
from secateur.graph.inputs import Arguments
from secateur.graph.kept import Kept
from secateur.targets.units.compare import relative_difference, run, run_in_double
from secateur.targets.units.graph_form.traced import Traced
from secateur.targets.units.module_form.configuration import (
    built_from,
    changed_configuration,
    configurations_in,
    has_configuration,
    set_numbers,
)
from secateur.targets.units.module_form.reading import read_configuration, shapes_of

_SAME = 1e-9
"""The relative difference in float64 up to which two models compute the same."""


def new_metadata(traced: Traced, small: nn.Module, kept: Kept) -> dict[str, Any]:
    """Find new values for the numbers in feature tables and configurations.

    Args:
        traced: The dense model and its trace.
        small: The smaller module.
        kept: Which positions of tensors stay.

    Returns:
        Path of each number that changes -> its new value.
    """
    model, graph = traced.model, traced.graph
    return {
        **_feature_info(model, graph, kept),
        **_feature_widths(model, small, graph),
        **{f"config.{path}": value for path, value in _configuration(traced, small).items()},
    }


def folder_note(traced: Traced, small: nn.Module, metadata: Mapping[str, Any]) -> str:
    """Say what to use where the model's class could not load what `save_pretrained` writes; empty if it can.

    Args:
        traced: The dense model and its trace.
        small: The smaller module.
        metadata: The result of `new_metadata`.
    """
    model = traced.model
    if not has_configuration(model) or not hasattr(model, "save_pretrained"):
        return ""
    changes = {k.removeprefix("config."): v for k, v in metadata.items() if k.startswith("config.")}
    if traced.builds.shapes(changes) == shapes_of(small):
        return ""
    return (
        f"{type(model.config).__name__} cannot give the new sizes, so {type(model).__name__}.from_pretrained "
        "refuses the folder that save_pretrained writes: use sc.save and sc.load, or sc.export to a .pt2 "
        "file."
    )


def _feature_info(model: nn.Module, graph: Graph, kept: Kept) -> dict[str, int]:
    """Find new `num_chs` in timm's table of feature maps: the widths that their modules return."""
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
        new = _width_after(graph, kept, str(entry.get("module", "")), entry["num_chs"])
        if new is not None and new != entry["num_chs"]:
            found[f"{prefix}.{number}.num_chs"] = new
    return found


def _width_after(graph: Graph, kept: Kept, module: str, width: int) -> int | None:
    """Return how many of the `width` channels that a module returns stay; None if unknown."""
    last = None
    for node in graph.program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any(path == module for path, _ in stack.values()):
            last = node
    axes = kept.at(last) if module and last is not None else []
    for axis in (*axes[1:2], *axes[-1:]):
        if isinstance(axis, np.ndarray) and len(axis) == width:
            return int(axis.sum())
    return None


def _feature_widths(model: nn.Module, small: nn.Module, graph: Graph) -> dict[str, int]:
    """Find new `num_features` and `head_hidden_size` of a timm model: the widths that two methods return."""

    def shapes(of: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Size]:
        with evaluating(of), torch.no_grad():
            features = of.forward_features(*args, **kwargs)
            hidden = of.forward_head(features, pre_logits=True)
        return {"num_features": features.shape, "head_hidden_size": hidden.shape}

    if not all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features")):
        return {}
    try:
        before, after = (shapes(of, *_trials(graph, device_of(small))[0]) for of in (model, small))
    except Exception:  # these methods are not those of timm
        return {}
    found = {}
    for name in before:
        old = getattr(model, name, None)
        new = {b for a, b in zip(before[name], after[name], strict=True) if a == old and b != old}
        if len(new) == 1:
            found[name] = int(new.pop())
    return found


def _trials(graph: Graph, device: torch.device) -> list[Arguments]:
    """Return arguments of the traced size and of every other one, drawn if the model runs on drawn values."""
    given = None if graph.inputs.drawn else graph.captured_inputs()
    return [options[0] for _, options in graph.inputs.trials(given, device=device)]


def _configuration(traced: Traced, small: nn.Module) -> dict[str, Any]:
    """Find numbers for a configuration with which the model's class computes what the smaller model does.

    For each candidate, the class is built with the tensors of the smaller model, and run. The smaller model
    runs with the new numbers too, since its code may read its configuration.
    """
    model = traced.model
    if not has_configuration(model):
        return {}
    options = read_configuration(traced.builds, shapes_of(small)).options
    if not any(options):
        return {}
    wanted = _Answers(small, _trials(traced.graph, device_of(small)))
    for changes in options:
        config = changed_configuration(model.config, changes)
        if wanted.given_by(built_from(type(model), config, small)):
            with _configured(small, changes):
                if wanted.given_by(small):
                    return changes
    return {}


class _Answers:
    """The outputs of a model for some inputs."""

    def __init__(self, model: nn.Module, trials: list[Arguments]) -> None:
        self.trials: list[Arguments] = []
        self.own: list[list[torch.Tensor]] = []
        for trial in trials:
            with contextlib.suppress(Exception):  # a forward pass may refuse inputs in any way
                self.own.append(run(model, *trial))
                self.trials.append(trial)
        self.model, self.double = model, list[list[torch.Tensor]]()

    def given_by(self, other: nn.Module) -> bool:
        """Whether another model gives the same outputs, bit for bit or in float64."""
        if not self.trials:
            return False
        try:
            found = [run(other, *trial) for trial in self.trials]
            if all(relative_difference(a, b) == 0 for a, b in zip(found, self.own, strict=True)):
                return True
            self.double = self.double or [run_in_double(self.model, *trial) for trial in self.trials]
            found = [run_in_double(other, *trial) for trial in self.trials]
        except Exception:  # its forward pass may fail in any way
            return False
        return all(relative_difference(a, b) <= _SAME for a, b in zip(found, self.double, strict=True))


@contextmanager
def _configured(small: nn.Module, changes: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the model's configuration has these numbers."""
    before = [(config, dict(vars(config))) for config in configurations_in(small)]
    try:
        set_numbers(small, changes)
        yield
    finally:
        for config, fields in before:
            vars(config).clear()
            vars(config).update(fields)
