"""Write a Hugging Face folder that ``from_pretrained`` of the stock class loads, with a model card."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.artefact.export.checking import Runs
from secateur.common.models import device_of
from secateur.errors import ArtefactError, ExportError, SettingError
from secateur.group_decision import GroupDecision
from secateur.targets.units.compare import run
from secateur.targets.units.module_form.configuration import (
    LAYERS,
    has_configuration,
    named,
    nested_configurations,
    quietly,
)
from secateur.targets.units.module_form.reading import (
    Builds,
    configuration_fits,
    read_configuration,
    shapes_of,
)
from secateur.targets.units.record import record_of

CONFIG, CARD = "config.json", "README.md"


def require_pretrained(model: nn.Module, path: Path) -> None:
    """Check that a model can be written as a Hugging Face folder.

    Raises:
        SettingError: If it is not a Transformers model in form ``module``.
        ExportError: If its configuration cannot express the pruned sizes.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise SettingError(
            f"export({path}): expected a model of Transformers for a folder, got {type(model).__name__}, "
            f"which has no save_pretrained. Use secateur.save, or name a file that ends in .onnx or .pt2."
        )
    if not configuration_fits(model):
        raise ExportError(f"export({path}): {_unsaid(model)}")


def require_folder(path: Path) -> None:
    """Check that a folder can be written there.

    Raises:
        SettingError: There is a file, or a folder with other files in it.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise SettingError(f"export({path}): expected a folder, got a file there. Name another.")
    if os.path.isdir(path) and any(path.iterdir()) and not os.path.isfile(path / CONFIG):
        raise SettingError(
            f"export({path}): expected an empty folder or an earlier export, got one with other files in it. "
            f"Name another."
        )


def _unsaid(model: nn.Module) -> str:
    """Say which sizes the configuration cannot express, why, and which settings avoid it."""
    kind, config = type(model).__name__, type(model.config).__name__
    otherwise = "or pass own_code=True, or use secateur.save or .pt2, which hold any sizes"
    if not has_configuration(model):
        return f"expected a configuration of Transformers, got {config}. Name a .pt2 file, {otherwise}."
    gap = read_configuration(Builds(type(model), model.config), shapes_of(model)).gap
    if not gap.axes:
        return f"expected {config} to give the model, but {gap.reason}. Name a .pt2 file, {otherwise}."
    layers = _listed(tensor.rpartition(".")[0] for tensor, _ in gap.axes)
    groups = _groups(model, {tensor for tensor, _ in gap.axes})
    names = ", ".join(f'"{name}"' for name in dict.fromkeys(map(_any_layer, (g.name for g in groups))))
    ask = (
        f"Leave these groups out (sc.Limits(ignore=({names},)))"
        if groups
        else "Leave these layers as they are"
    )
    steps = {group.size * gap.step for group in groups}
    why = f"its {_listed(gap.paths)} cannot: {gap.reason}"
    if gap.uneven:
        why = f"its {_listed(gap.paths)} {gap.reason} ({kind} reads no {LAYERS} for it)"
        ask = "Remove as many units of each (sc.Uniform(ratio=0.3), without a budget)"
    elif len(steps) == 1 and (step := steps.pop()) >= 2 and step.denominator == 1:
        ask = f"Keep a multiple of {step} units of each (sc.Limits(round_to={step}))"
    elif not gap.paths:
        heads = {named(held, "num_attention_heads") for _, held in nested_configurations(model.config)}
        why = "no field of it does"
        if any(group.size in heads for group in groups):
            why += ": these heads are hidden_size / num_attention_heads wide, and no head_dim is read"
    return f"expected {config} to give the sizes of {layers}, but {why}. {ask}, {otherwise}."


def _groups(model: nn.Module, tensors: set[str]) -> list[GroupDecision]:
    """Return the pruned groups that have units in one of these tensors."""
    try:
        groups = record_of(model).plan.groups
    except ArtefactError:  # not pruned by secateur
        return []
    return [g for g in groups if g.removed and any(piece.tensor in tensors for piece in g.slices)]


def _any_layer(path: str) -> str:
    """Replace the layer numbers in a path by ``*``."""
    return re.sub(r"\d+", "*", path)


def _listed(paths: Iterable[str], most: int = 2) -> str:
    """List up to `most` paths and the number of others. Paths that differ only by layer number count once."""
    names = list(dict.fromkeys(map(_any_layer, paths)))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def write_pretrained(model: nn.Module, path: Path, card: str, *, own_names: bool = False) -> None:
    """Write configuration, tensors and model card into an empty folder.

    Args:
        model: A model of Transformers.
        path: The folder.
        card: The text of README.md.
        own_names: Whether tensors keep the model's names. Else Transformers may write the names of older
            releases, which only its own classes can read.
    """
    save: Any = model.save_pretrained
    known = "save_original_format" in inspect.signature(save).parameters
    with quiet():
        save(path, **({"save_original_format": False} if own_names and known else {}))
    (path / CARD).write_text(card, encoding="utf-8")


def pretrained_runner(path: Path, model: nn.Module) -> Runs:
    """Return a function that runs the model which the stock class loads from the folder."""
    with quiet():
        stock = type(model).from_pretrained(path, dtype="auto", local_files_only=True)  # type: ignore[attr-defined]
    stock = stock.to(device_of(model))

    def runs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        return run(stock, args, kwargs)

    return runs


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Transformers' progress bars and log messages inside the block."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    with quietly():
        try:
            bars.disable_progress_bar()
            yield
        finally:
            if shown:
                bars.enable_progress_bar()
