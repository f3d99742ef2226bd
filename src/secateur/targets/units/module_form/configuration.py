"""Reading and changing numbers in a Hugging Face configuration."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.calibration.randomness import seeded
from secateur.common.models import device_of
from secateur.errors import ArtefactError
from secateur.targets.experts.empty import empty_weights

Changes = Mapping[str, Any]
"""Path of a number in a configuration -> its value. Paths are ``num_heads``, ``text_config.num_heads``,
``widths.0`` in a list, or ``per_layer_config.3.num_heads`` for a single layer."""

LAYERS = "per_layer_config"
"""The field in which Transformers keeps numbers for single layers."""


def has_configuration(model: nn.Module) -> bool:
    """Whether a model has a configuration like those of Transformers."""
    return hasattr(getattr(model, "config", None), "to_dict")


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, there are no warnings and no logs of Transformers. Random state is restored afterwards."""
    log = logging.getLogger("transformers")
    level = log.level
    with warnings.catch_warnings(), seeded(0):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def nested_configurations(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a configuration and those inside it, each with the prefix of its paths."""
    yield prefix, config
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and not isinstance(value, type):
            yield from nested_configurations(value, f"{prefix}{name}.")


def named(config: Any, name: str) -> int | None:
    """Return the number that a configuration has under a common name of Transformers; None if it has none."""
    try:
        value = getattr(config, name, None)
    except Exception:  # the number differs between layers
        return None
    return value if isinstance(value, int) else None


def numbers_of(config: Any) -> Iterator[tuple[str, int | float]]:
    """Return the numbers that may decide a size, by path: integers of at least 2, others of at least 1."""
    for prefix, owner in nested_configurations(config):
        for name, value in owner.to_dict().items():
            entries = {f"{prefix}{name}": value}
            if isinstance(value, list | tuple):
                entries = {f"{prefix}{name}.{k}": entry for k, entry in enumerate(value)}
            elif name == LAYERS:
                layers = _layers({LAYERS: value})
                entries = {f"{prefix}{name}.{k}.{f}": v for k, own in layers.items() for f, v in own.items()}
            for path, entry in entries.items():
                whole = isinstance(entry, int) and not isinstance(entry, bool) and entry > 1
                if whole or (isinstance(entry, float) and entry >= 1):
                    yield path, entry


def changed_configuration(config: Any, changes: Changes) -> Any:
    """Copy a configuration with other numbers, by writing and loading it. Its own errors are raised."""
    changed = copy.deepcopy(config)
    for path, value in changes.items():
        set_number(changed, path, value)
    if not hasattr(type(changed), "from_dict"):
        return changed
    loaded = type(changed).from_dict(changed.to_dict())
    if getattr(config, "_attn_implementation", None) is not None:  # not saved in a file
        loaded._attn_implementation = config._attn_implementation
    return loaded


def set_number(config: Any, path: str, value: Any) -> None:
    """Set a number in a configuration.

    Raises:
        ArtefactError: The configuration has no such path.
    """
    owner, (*parts, name) = _owner(config, path)
    if parts[:1] == [LAYERS]:
        layers = _layers(owner.to_dict())
        layers.setdefault(int(parts[1]), {})[name] = value
        name, value = LAYERS, layers
    elif parts:
        values = list(getattr(owner, parts[0]))
        values[int(name)] = value
        name, value = parts[0], values
    setattr(owner, name, value)


def number_at(config: Any, path: str) -> Any:
    """Return the number at a path; None if there is none."""
    owner, parts = _owner(config, path)
    fields = owner.to_dict()
    if parts[0] == LAYERS:
        return _layers(fields).get(int(parts[1]), {}).get(parts[2])
    value = fields.get(parts[0])
    return value[int(parts[1])] if len(parts) > 1 and value is not None else value


def configurations_in(model: nn.Module) -> list[Any]:
    """Return all configurations of a model and its submodules, each once."""
    own = [c for m in model.modules() if hasattr(c := getattr(m, "config", None), "to_dict")]
    return list({id(each): each for config in own for _, each in nested_configurations(config)}.values())


def set_numbers(model: nn.Module, changes: Changes) -> None:
    """Set numbers in the configuration of a model, and in copies of it in submodules.

    A copy has the same class and the same number. The encoder and decoder of T5, for example, have one each.
    """
    for path, value in changes.items():
        old, (owner, parts) = number_at(model.config, path), _owner(model.config, path)
        own = [each for _, each in nested_configurations(model.config) if type(each) is type(owner)]
        rest = ".".join(parts)
        for config in configurations_in(model) if len(own) == 1 else [owner]:
            if type(config) is type(owner) and number_at(config, rest) == old:
                set_number(config, rest, value)


def built_from(kind: type[nn.Module], config: Any, small: nn.Module) -> nn.Module:
    """Build a model of a class from a configuration, with the tensors of another model.

    Buffers that are not in the state dict are computed by the class, and get the other model's dtype.
    """
    with quietly(), empty_weights():
        built = kind(config)
    built.load_state_dict(small.state_dict(), assign=True)
    built.to(device_of(small))
    dtypes = {name: buffer.dtype for name, buffer in small.named_buffers()}
    for path, module in built.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            leaf = name.rpartition(".")[2]
            module._buffers[leaf] = buffer.to(dtypes.get(name, buffer.dtype))
    return built


def _layers(fields: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the numbers that only single layers have, by layer."""
    return {int(layer): dict(own) for layer, own in (fields.get(LAYERS) or {}).items()}


def _owner(config: Any, path: str) -> tuple[Any, list[str]]:
    """Return the innermost configuration on a path, and the rest of the path."""
    parts = path.split(".")
    if any(part.startswith("__") for part in parts):
        raise ArtefactError(f"sizes: expected a field of a configuration, got {path!r}.")
    while len(parts) > 1 and hasattr(inner := vars(config).get(parts[0]), "to_dict"):
        config = inner
        parts.pop(0)
    return config, parts
