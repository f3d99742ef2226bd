"""Numbers that repeat how many blocks there are, or which one a block is, after some are gone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

from torch import nn

from secateur.targets.units.module_form.configuration import (
    has_configuration,
    nested_configurations,
    set_number,
)
from secateur.targets.units.module_form.reading import Builds, shapes_of
from secateur.targets.units.module_form.sizes import put
from secateur.targets.units.tensors import submodule_called

_COUNTS = re.compile("layer|block|depth", re.IGNORECASE)
"""Names of numbers of blocks: num_hidden_layers, n_layer, num_blocks, depth."""

_POSITIONS = re.compile("layer|block|depth|idx|index|number|(^|[._])id$", re.IGNORECASE)
"""Names of numbers that say which block one is."""

_PLAIN = (bool, int, float, str, type(None))


def new_numbers(model: nn.Module, small: nn.Module, removed: Iterable[str]) -> dict[str, Any]:
    """Find new values of numbers and lists, by path in the smaller model.

    - A module's number of blocks, and the configuration's: an integer with such a name that equals the length
      of a list of blocks. Which of a configuration's numbers are meant is seen by building the class.
    - Lists in the configuration with such a name and an entry for each block: those of removed blocks go. In
      a list of blocks' numbers, the others are counted anew.
    - The number of each block: an attribute that all blocks of a list have, equal to their positions in it.

    Args:
        model: The dense model.
        small: The model without the blocks.
        removed: Paths of blocks that left their list.
    """
    found: dict[str, Any] = {}
    by_container: dict[str, list[str]] = {}
    for path in removed:
        by_container.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    for container, gone in by_container.items():
        names = [*model.get_submodule(container)._modules]
        places = [k for k, name in enumerate(names) if name not in gone]
        found |= _own_numbers(model, small, container, places)
        found |= _around(model, container, len(names), len(places))
    found |= _configured(model, small, by_container)
    return found


def _own_numbers(model: nn.Module, small: nn.Module, container: str, places: Sequence[int]) -> dict[str, int]:
    """Return the numbers of the blocks that stay."""
    values: dict[str, dict[int, int]] = {}
    for place, block in enumerate(model.get_submodule(container)._modules.values()):
        for path, module in () if block is None else block.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and not name.startswith("_"):
                    values.setdefault(f"{path}.{name}" if path else name, {})[place] = value
    names = [*small.get_submodule(container)._modules]
    found = {}
    for name, own in values.items():
        first = {value - place for place, value in own.items()}
        sure = len(own) > 1 and _POSITIONS.search(name)  # another number may be the block's own
        if sure and len(first) == 1 and first <= {0, 1}:  # counted from 0 or from 1
            for new, old in enumerate(places):
                if old in own:
                    found[f"{container}.{names[new]}.{name}".lstrip(".")] = new + min(first)
    return found


def _around(model: nn.Module, container: str, before: int, after: int) -> dict[str, int]:
    """Return numbers of blocks in the modules around a list, and in a configuration of a user's own."""
    found: dict[str, int] = {}
    path = container
    while True:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if not _is_alone(module, model.get_submodule(container)):
            return found
        owners: list[tuple[str, Any]] = [(path, module)]
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__") and not hasattr(config, "to_dict"):
            owners.append((f"{path}.config" if path else "config", config))
        for place, owner in owners:
            for name, value in vars(owner).items():
                if type(value) is int and value == before and _COUNTS.search(name) and name[0] != "_":
                    found[f"{place}.{name}" if place else name] = after
        if not path:
            return found


def _is_alone(module: nn.Module, container: nn.Module) -> bool:
    """Whether no other list in a module has as many blocks of the same kind: its number may mean either."""

    def kinds(some: nn.Module) -> tuple[int, set[type]]:
        return len(some._modules), {type(m) for m in some._modules.values()}

    wanted = kinds(container)
    return all(
        other is container or kinds(other) != wanted
        for other in module.modules()
        if isinstance(other, nn.ModuleList | nn.Sequential)
    )


def _configured(model: nn.Module, small: nn.Module, gone: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return new values in configurations: those with which their classes have the smaller model's tensors.

    A configuration counts if a module around the blocks has it, or one of the blocks. The stacks of an
    encoder and a decoder may have copies of their own.
    """
    owners: dict[int, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():  # the outermost module comes first
        around = any(f"{container}.".startswith(f"{path}." if path else "") for container in gone)
        inside = path.startswith(tuple(f"{container}." for container in gone))
        if (around or inside) and has_configuration(module):
            owners.setdefault(id(module.config), (path, module))
    found: dict[str, Any] = {}
    for path, module in owners.values():
        sizes, lists = _candidates(module, model, gone)
        changes: Mapping[str, Any] = {}
        inner = submodule_called(small, path)
        if inner is not None and has_configuration(inner):
            builds, wanted = Builds(type(module), module.config), shapes_of(inner)
            options = [c for c in _options(sizes, lists) if builds.shapes(c) == wanted]
            if options:
                changes = options[0]
            elif builds.shapes({}) is None:  # the class says nothing
                changes = {**sizes, **lists}
        found |= {f"{path}.config.{k}".lstrip("."): value for k, value in changes.items()}
    return found


def _candidates(
    module: nn.Module, model: nn.Module, gone: Mapping[str, Sequence[str]]
) -> tuple[dict[str, int], dict[str, list[Any]]]:
    """Return the numbers and lists of a module's configuration that may be about blocks, with new values."""
    sizes: dict[str, int] = {}
    lists: dict[str, list[Any]] = {}
    for container, names in gone.items():
        all_names = [*model.get_submodule(container)._modules]
        stay = [k for k, name in enumerate(all_names) if name not in names]
        for prefix, owner in nested_configurations(module.config):
            for name, value in vars(owner).items():
                path = f"{prefix}{name}"
                if type(value) is int and value == len(all_names) and _COUNTS.search(name):
                    sizes[path] = len(stay)
                elif (
                    isinstance(value, list | tuple)
                    and _COUNTS.search(name)
                    and len(value) == len(all_names)
                    and all(type(entry) in _PLAIN for entry in value)
                ):
                    lists[path] = [value[k] for k in stay]
                elif isinstance(value, list) and _COUNTS.search(name) and _indices(value, len(all_names)):
                    lists[path] = [stay.index(k) for k in value if k in stay]
    return sizes, lists


def _indices(values: Sequence[Any], count: int) -> bool:
    """Whether a list names single layers."""
    whole = all(type(k) is int and 0 <= k < count for k in values)
    return bool(values) and whole and len(set(values)) == len(values)


def _options(sizes: Mapping[str, int], lists: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield changes to try: some of the numbers, few first, with all of the lists or none."""
    some = chain.from_iterable(combinations(sizes, n) for n in range(1, min(len(sizes), 3) + 1))
    for chosen in some:
        for also in (lists, {}) if lists else ({},):
            yield {**{path: sizes[path] for path in chosen}, **also}


def set_new_numbers(small: nn.Module, numbers: Mapping[str, Any]) -> None:
    """Set what `new_numbers` found.

    Raises:
        ArtefactError: A path leads to what is neither a number nor a list.
    """
    for key, value in numbers.items():
        place, _, name = key.partition("config.")
        owner = submodule_called(small, place.rstrip(".")) if name and place[-1:] in ("", ".") else None
        if owner is not None and has_configuration(owner):
            set_number(owner.config, name, value)  # of this configuration alone, which modules share
        else:
            put(small, key, value)
