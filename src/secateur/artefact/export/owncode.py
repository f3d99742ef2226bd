"""Write a Hugging Face folder for sizes that no configuration can say: with a small modeling file of ours."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.artefact.export.checking import Runs
from secateur.artefact.export.huggingface import CONFIG, quiet, write_pretrained
from secateur.common.models import device_of, named_tensors
from secateur.errors import ArtefactError, ExportError, SettingError
from secateur.targets.experts.empty import empty_weights
from secateur.targets.units.compare import run
from secateur.targets.units.module_form.configuration import has_configuration, quietly
from secateur.targets.units.record import record_of

TEMPLATE, MODELING = "modeling.py.txt", "modeling_secateur"
AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModel",
)
"""Classes of Transformers that find a model's class by its configuration."""


def require_own_code(model: nn.Module, path: Path) -> None:
    """Check that a model's sizes can be stated beside its configuration.

    Raises:
        SettingError: It is no model of Transformers.
        ExportError: It is no module of its own class, or its class reads more than sizes.
    """
    if not has_configuration(model) or not hasattr(model, "save_pretrained"):
        raise SettingError(
            f"export({path}): expected a model of Transformers for own_code=True, got "
            f"{type(model).__name__}. "
            "Use secateur.save, or name a file that ends in .onnx or .pt2."
        )
    try:
        record = record_of(model)
    except ArtefactError:
        record = None
    reason = ""
    if record is not None and record.form != "module":
        reason = f"got form {record.form}, whose code is not the class's. Apply the plan with form='module'"
    elif record is not None and (record.captured or record.stand_ins):
        names = ", ".join([*record.captured, *record.stand_ins][:3])
        reason = f"got one in which the code of {names} is changed. Use secateur.save or a .pt2 file"
    elif base_of(model) is None:
        reason = "got a class of another library. Use secateur.save or a .pt2 file"
    if reason:
        raise ExportError(
            f"export({path}): expected a model that differs from its class in sizes alone, {reason}."
        )


def base_of(model: nn.Module) -> type | None:
    """Return the class of Transformers that a model is of; None if there is none that can be imported."""
    import transformers

    found = (kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    kind = next(found, None)
    return kind if kind is not None and getattr(transformers, kind.__name__, None) is kind else None


def sizes_beside(model: nn.Module, base: type) -> dict[str, dict[str, Any]]:
    """Return what differs between a model and its class as the configuration makes it.

    Returns:
        ``shapes``: tensor -> its shape; ``numbers``: path of a module -> attribute -> value.
    """
    with quietly(), empty_weights():
        stock = base(model.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(stock).items()}
    own = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    if odd := sorted(shapes.keys() ^ own.keys()):
        raise ExportError(
            f"export: expected the tensors of {base.__name__}, got others: {', '.join(odd[:3])}. Use "
            "secateur.save."
        )
    numbers: dict[str, Any] = {}
    for path, module in stock.named_modules():
        before, after = (_numbers(of) for of in (module, model.get_submodule(path)))
        changed = {name: value for name, value in after.items() if before.get(name, value) != value}
        if changed:
            numbers[path] = changed
    return {"shapes": {n: list(own[n]) for n in own if own[n] != shapes[n]}, "numbers": numbers}


def _numbers(module: nn.Module) -> dict[str, Any]:
    """A module's own whole numbers, and tuples of such, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name != "training"
        and (
            (isinstance(value, int) and not isinstance(value, bool))
            or (isinstance(value, tuple) and value and all(type(each) is int for each in value))
        )
    }


def write_own_code(model: nn.Module, path: Path, card: str) -> None:
    """Write configuration, tensors, model card and modeling file into an empty folder."""
    base = base_of(model)
    assert base is not None  # noqa: S101  # `require_own_code` looked
    write_pretrained(model, path, card, own_names=True)
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    code = template.format(base=base.__name__, version=metadata.version("secateur"))
    (path / f"{MODELING}.py").write_text(code, encoding="utf-8")
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    config["auto_map"] = dict.fromkeys(_auto_classes(model, base), f"{MODELING}.{base.__name__}")
    config["pruned"] = sizes_beside(model, base)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _auto_classes(model: nn.Module, base: type) -> list[str]:
    """The classes of Transformers that give `base` for the model's configuration."""
    import transformers

    found = []
    for name in AUTO:
        known = getattr(getattr(transformers, name, None), "_model_mapping", {})
        kinds = known[type(model.config)] if type(model.config) in known else ()
        if base in (kinds if isinstance(kinds, tuple) else (kinds,)):
            found.append(name)
    return found or ["AutoModel"]


def own_code_runner(path: Path, model: nn.Module) -> Runs:
    """Return a function that runs the model which the folder's own class loads."""
    spec = importlib.util.spec_from_file_location(MODELING, path / f"{MODELING}.py")
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018  # it was just written
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    base = base_of(model)
    assert base is not None  # noqa: S101
    with quiet():
        loaded = getattr(module, base.__name__).from_pretrained(path, dtype="auto", local_files_only=True)
    loaded = loaded.to(device_of(model))

    def runs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        return run(loaded, args, kwargs)

    return runs
