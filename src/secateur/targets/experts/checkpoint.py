"""Checkpoints of Transformers: written from a pruned model, or rewritten on disk from a plan."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.artefact.writing import new_folder
from secateur.common.mapped import INDEX, files_of
from secateur.common.paths import entries, path_named
from secateur.common.reading import parse_json, read_bytes
from secateur.common.tensorfile import tensor_file
from secateur.errors import ArtefactError, SettingError
from secateur.group_decision import GroupDecision
from secateur.plan import Plan
from secateur.targets.experts.blocks import is_count
from secateur.targets.units.record import record_of

CONFIG, PLAN = "config.json", "secateur_plan.json"
_LARGEST_CONFIG = 1 << 24
_LARGEST_OTHER = 1 << 28
"""Bytes of a file that is copied. A larger one holds the dense weights in another format."""

_LISTED = re.compile(r"^(?P<before>.*\bexperts)\.(?P<number>\d+)\.(?P<after>.+)$")
"""How checkpoints name a single expert's tensors, also where the model holds them fused."""


def save_pretrained(small: nn.Module, directory: str | Path) -> Path:
    """Write a checkpoint that stock Transformers loads: ``AutoModelForCausalLM.from_pretrained``.

    The plan is written beside it. Equal numbers of experts in all blocks are needed, as
    `EqualCounts` plans them; others are saved with `secateur.save`.

    Args:
        small: What `apply` returned for a model of Transformers.
        directory: A folder that does not exist yet, or is empty.

    Raises:
        SettingError: Other things than experts went, the blocks keep different numbers, or the model is none
            of Transformers'.
        ArtefactError: There is something in the folder.
    """
    plan = record_of(small).plan
    if plan.granularity != "expert":
        raise SettingError(
            "save_pretrained: expected a model without some experts, got one pruned with granularity "
            f"{plan.granularity!r}. Use secateur.export, which says what a configuration can hold, "
            "or secateur.save."
        )
    counts = {group.kept for group in plan.groups}
    if len(counts) > 1:
        raise SettingError(
            f"save_pretrained: expected equally many experts in all blocks, got {sorted(counts)}. Plan with "
            "sc.EqualCounts(rule), or save with secateur.save and load with secateur.load."
        )
    if not hasattr(small, "save_pretrained"):
        raise SettingError(
            f"save_pretrained: expected a model of Transformers, got {type(small).__name__}. Use "
            "secateur.save."
        )
    place = path_named("save_pretrained", directory)
    with new_folder(place) as folder:
        small.save_pretrained(folder)  # type: ignore[operator]  # Transformers' own
        plan.to_json(folder / PLAN)
    return place


def prune_checkpoint(source: str | Path, plan: Plan, directory: str | Path) -> Path:
    """Remove a plan's experts from a checkpoint on disk, one shard at a time.

    The model is never built: one shard is read, cut and written before the next. Experts may be stored
    fused, or one by one as checkpoints of Transformers often are; those that stay are numbered anew. The
    configuration's counts follow; where blocks keep different numbers, they stay as they are and
    ``per_layer_config`` says the rest. Other files of the folder are copied. Those above 256 MB are left out
    with a warning: they hold the dense weights in another format, as ``pytorch_model.bin`` does.

    Args:
        source: A folder with ``config.json`` and ``model.safetensors``, whole or sharded.
        plan: For the model of this checkpoint.
        directory: A folder that does not exist yet, or is empty.

    Returns:
        The folder. It holds the plan too.

    Raises:
        ArtefactError: A file is missing, damaged or a link to outside of the folder, or the checkpoint does
            not hold what the plan removes.
    """
    source, directory = (path_named("prune_checkpoint", place) for place in (source, directory))
    there = entries(source, "prune_checkpoint") if os.path.isdir(source) else []
    files = [file for file in there if os.path.isfile(file)]
    _check_links(source, files)
    others = [file for file in files if file.suffix != ".safetensors"]
    large = [file for file in others if os.path.getsize(file) > _LARGEST_OTHER]
    shards = [file.name for file in files_of(source)]
    config = _read_json(source / CONFIG)
    blocks = [_OnDisk.of(group) for group in plan.groups if group.removed]
    _check(source, shards, blocks)
    with new_folder(directory) as folder:
        weight_map: dict[str, str] = {}
        total = 0
        for shard in shards:
            tensors = dict(_pruned(source / shard, blocks))
            total += sum(t.nbytes for t in tensors.values())
            weight_map |= dict.fromkeys(tensors, shard)
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            del tensors
        if os.path.isfile(source / INDEX):
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder / INDEX, index)
        _write_json(folder / CONFIG, pruned_config(config, plan))
        plan.to_json(folder / PLAN)
        for file in others:
            if not os.path.exists(folder / file.name) and file not in large:
                shutil.copyfile(file, folder / file.name)
    if large:
        warnings.warn(
            f"prune_checkpoint: left out {', '.join(file.name for file in large)[:200]}, as large as dense "
            "weights in another format. If it is something else, copy it yourself.",
            stacklevel=2,
        )
    return directory


def _check_links(source: Path, files: list[Path]) -> None:
    """Refuse links to outside of a checkpoint: a copy of it would hold what they point to.

    The cache of the hub keeps the files of its ``snapshots`` in ``blobs`` beside them.

    Raises:
        ArtefactError: There is such a link.
    """
    here = Path(os.path.realpath(source)) if files else source
    allowed = {here, here.parents[1] / "blobs"} if here.parent.name == "snapshots" else {here}
    for file in files:
        if file.is_symlink() and Path(os.path.realpath(file)).parent not in allowed:
            raise ArtefactError(
                f"{source}: expected files in this folder, got a link to outside of it, {file.name!r}. "
                "Put the file itself there, or remove the link."
            )


def pruned_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """A configuration with true numbers of experts.

    Args:
        config: As `config.json` holds it; the counts may be in a part of it, such as ``text_config``.
        plan: The decision.
    """
    found = {name: pruned_config(v, plan) if isinstance(v, Mapping) else v for name, v in config.items()}
    sizes = {group.size for group in plan.groups}
    kept = {group.kept for group in plan.groups}
    fields = [n for n, v in config.items() if is_count(n) and type(v) is int and v in sizes]
    if len(kept) == 1:
        found |= dict.fromkeys(fields, kept.pop())
    elif fields:
        layers = {_layer_number(group.name): group.kept for group in plan.groups}
        found["per_layer_config"] = {
            str(layer): dict.fromkeys(fields, count) for layer, count in sorted(layers.items())
        }
    return found


def _layer_number(name: str) -> int:
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", f".{name}")
    return int(numbers[0]) if numbers else 0


@dataclass(frozen=True)
class _OnDisk:
    """What of a checkpoint a block's removed experts are.

    Attributes:
        name: The block's path in the model.
        layer: What the names of all its tensors start with, up to the layer's number.
        removed: The experts that go. Ascending
        size: Experts before.
        tensors: Names in the model of tensors that lose positions, and along which axis.
    """

    name: str
    layer: str
    removed: tuple[int, ...]
    size: int
    tensors: Mapping[str, int]

    @classmethod
    def of(cls, group: GroupDecision) -> _OnDisk:
        layer = re.match(r"^.*?\.\d+\.", group.name + ".")
        tensors = {s.tensor: s.axis for s in group.slices if _LISTED.match(s.tensor) is None}
        return cls(group.name, layer[0] if layer else "", group.removed, group.size, tensors)

    def number(self, name: str) -> int | None:
        """Which of the block's experts a tensor of this name belongs to alone; None for any other tensor."""
        match = _LISTED.match(name) if name.startswith(self.layer) else None
        return int(match["number"]) if match else None

    def axis(self, name: str) -> int | None:
        """The experts' axis of a tensor of this name; None where it has none.

        A checkpoint may call the block something else; the layer and the tensor's own name tell.
        """
        if name in self.tensors:
            return self.tensors[name]
        if not name.startswith(self.layer) or self.number(name) is not None:
            return None
        tail = name.split(".")[-2:]
        return next((axis for own, axis in self.tensors.items() if own.split(".")[-2:] == tail), None)


def _pruned(file: Path, blocks: list[_OnDisk]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard that stay, by their new names, read one by one."""
    with tensor_file(file, str(file), ArtefactError) as shard:
        for name in shard.entries:
            found = _renamed(name, blocks)
            if found is None:
                continue
            tensor = shard.tensor(name)
            for block in blocks:
                axis = block.axis(name)
                if axis is not None and tensor.ndim > axis and tensor.shape[axis] == block.size:
                    tensor = tensor.index_select(axis, torch.from_numpy(_stays(block)))
            yield found, tensor


def _stays(block: _OnDisk) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(block.size), block.removed).astype(np.int64)


def _renamed(name: str, blocks: list[_OnDisk]) -> str | None:
    """The tensor's new name; None if it goes."""
    for block in blocks:
        number = block.number(name)
        if number is not None:
            if number in block.removed:
                return None
            match = _LISTED.match(name)
            new = number - int(np.searchsorted(block.removed, number))
            return f"{match['before']}.{new}.{match['after']}" if match else name
    return name


def _check(source: Path, shards: list[str], blocks: list[_OnDisk]) -> None:
    """Refuse a checkpoint that lacks what the plan removes, before anything is written."""
    shapes: dict[str, list[int]] = {}
    for shard in shards:
        with tensor_file(source / shard, str(source / shard), ArtefactError) as file:
            shapes |= {name: entry.shape for name, entry in file.entries.items()}
    for block in blocks:
        numbers = {block.number(name) for name in shapes} - {None}
        cut = [
            n
            for n, s in shapes.items()
            if (a := block.axis(n)) is not None and len(s) > a and s[a] == block.size
        ]
        fused = [n for n in cut if "experts" in n]
        if (numbers != set(range(block.size)) and not fused) or len(cut) == len(fused):
            raise ArtefactError(
                f"{source}: expected a router with {block.size} rows and {block.size} experts for "
                f"{block.name}, "
                f"got {len(cut) - len(fused)} tensors of a router and {len(numbers) or len(fused)} of "
                "experts. "
                "Name the checkpoint that the plan was made for."
            )


def _read_json(file: Path) -> dict[str, Any]:
    text = read_bytes(file, _LARGEST_CONFIG, str(file), ArtefactError, "JSON")
    try:
        content = parse_json(text, constants=True)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{file}: expected JSON, got {error}. Check the folder.") from error
    if not isinstance(content, dict):
        raise ArtefactError(
            f"{file}: expected a JSON object, got {type(content).__name__}. Check the folder."
        )
    return content


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
