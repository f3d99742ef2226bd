"""Store a pruned model's shapes in a training checkpoint, and give them to a new dense model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from torch import nn

from secateur.artefact.writing import replace_text
from secateur.common.caches import without_caches
from secateur.common.formatting import shorten
from secateur.common.models import device_of, unwrap
from secateur.common.paths import path_named
from secateur.common.reading import complaint, parse_json, read_bytes
from secateur.compat.training import own_forward
from secateur.errors import ArtefactError, PlanError
from secateur.graph.graph import fingerprint
from secateur.graph.inputs import Arguments
from secateur.graph.trace import retrace
from secateur.integrations.replacing import replace_parameters
from secateur.integrations.wrappers import refresh
from secateur.plan import LARGEST, Plan
from secateur.targets.blocks.remove import removed_paths
from secateur.targets.lowrank.opened import GRANULARITIES as RANKS
from secateur.targets.lowrank.opened import opened
from secateur.targets.units.module_form.mended import mend
from secateur.targets.units.module_form.module import smaller_module
from secateur.targets.units.module_form.realise import find_changes
from secateur.targets.units.record import Record, attach, record_of
from secateur.targets.units.tensors import check_positions

FORMAT = 1
FILE = "pruning.json"
ROUNDS = "rounds"
"""The entry of a plan's settings that holds the number of rounds that the plan combines."""


class _Content(BaseModel):
    """The dictionary that `shape_state` returns for a pruned model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int
    fingerprint: str
    plan: dict[str, JsonValue]
    note: str
    sizes: dict[str, bool | int | list[int]]
    captured: list[str]


def shape_state(model: nn.Module) -> dict[str, Any]:
    """Return a description of how a model was made smaller, as plain data for a checkpoint.

    Args:
        model: A model that a `GradualPruner` prunes, with or without wrapper; or a model that `sc.apply`
            returned in form ``module``.

    Returns:
        Numbers, strings, lists and dictionaries, which JSON and ``torch.load`` in safe mode can hold. Empty
        if nothing was removed from the model.

    Raises:
        ArtefactError: If the model was pruned in another form, or lost residual blocks.
    """
    model = unwrap(model)
    record = pruned_record(model)
    if record is None:
        return {}
    _require_all_blocks("shape_state", record.plan)
    return {
        "format": FORMAT,
        "fingerprint": fingerprint(model),
        "plan": json.loads(record.plan.to_json()),
        "note": record.note,
        "sizes": json.loads(json.dumps(record.sizes)),
        "captured": list(record.captured),
    }


def reshape(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a new dense model the shapes of a checkpoint, in place. Load the tensors afterwards.

    Call this before you make an optimizer and before you load the state dict.

    Args:
        model: The dense model, or a model that already has the checkpoint's shapes.
        state: The result of `shape_state`.

    Raises:
        ArtefactError: If the state is malformed, was written by a newer version, or belongs to another
            model.
    """
    inner = unwrap(model)
    found = pruned_record(inner)
    if not state:
        if found is not None:
            raise ArtefactError(
                f"reshape: expected a dense model, as the checkpoint holds one, got a {type(inner).__name__} "
                "that has been pruned. Make the model anew."
            )
        return
    content = _read(state)
    try:
        plan = Plan.from_json(json.dumps(content.plan))
        _require_all_blocks("reshape", plan)
        mine = fingerprint(inner)
        record = Record(plan, "module", content.note, sizes=content.sizes, captured=tuple(content.captured))
        if mine == content.fingerprint and (found is None or found.plan == plan):
            attach(inner, record)
            return
        plan.check(mine)
        check_positions(inner, plan)
    except PlanError as error:
        raise ArtefactError(
            f"reshape: {error} A checkpoint of pruned training goes on from the dense model, made anew."
        ) from error
    with own_forward(inner):
        replace_parameters(inner, _smaller(inner, record))
    attach(inner, record)
    refresh(model)


def write_shape(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write `shape_state` into a checkpoint's folder, and return the path of the file."""
    path = path_named("write_shape", folder) / FILE
    replace_text(path, json.dumps(shape_state(model), indent=1) + "\n")
    return path


def read_shape(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_shape` wrote. If there is no file, nothing was removed, and the result is empty.

    Raises:
        ArtefactError: If the file is damaged.
    """
    path = path_named("read_shape", folder) / FILE
    if not os.path.lexists(path):
        return {}
    text = read_bytes(path, LARGEST, str(path), ArtefactError, "JSON")
    try:
        state = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: expected JSON, got {error}. Take another checkpoint.") from error
    if not isinstance(state, dict):
        raise ArtefactError(
            f"{path}: expected a mapping, got {type(state).__name__}. Take another checkpoint."
        )
    return state


def pruned_record(model: nn.Module) -> Record | None:
    """Return the record of all pruning of a model so far; None if it was not pruned.

    Raises:
        ArtefactError: If it was pruned in another form than ``module``.
    """
    try:
        record = record_of(model)
    except ArtefactError:
        return None
    if record.form != "module":
        raise ArtefactError(
            f"gradual pruning: expected a plain model or one of form 'module', got form {record.form!r}. "
            "Apply the plan with form='module'."
        )
    return record


def rounds_of(model: nn.Module) -> int:
    """Return the number of rounds in which a model was pruned so far."""
    record = pruned_record(model)
    return 0 if record is None else int(str(record.plan.settings.get(ROUNDS, 0)))


def _require_all_blocks(where: str, plan: Plan) -> None:
    if dropped := removed_paths(plan):
        raise ArtefactError(
            f"{where}: expected a plan that changes shapes alone, got one that drops {shorten(dropped, 3)}. "
            "Save the model with sc.save, and load it with sc.load."
        )


def _smaller(model: nn.Module, record: Record) -> nn.Module:
    plan = record.plan
    if plan.granularity in RANKS:
        found = opened(model, plan)
        model, plan = found.model, found.plan

    def arguments() -> Arguments:
        return plan.inputs.arguments(None, device_of(model))

    with without_caches(model, arguments):
        small = smaller_module(model, plan, record.sizes)
        if record.captured:
            exact = all(g.exact for g in plan.groups)
            graph = retrace(model, plan.inputs, arguments(), allow_inexact=not exact)
            _, codes, _ = find_changes(model, graph, plan)
            mend(small, codes)
    return attach(small, record)


def _read(state: Mapping[str, Any]) -> _Content:
    written = state.get("format")
    if isinstance(written, int) and written > FORMAT:
        raise ArtefactError(
            f"reshape: expected format {FORMAT} or older, got {written}, which a newer secateur wrote. "
            "Upgrade secateur."
        )
    try:
        return _Content.model_validate(dict(state))
    except ValidationError as error:
        raise ArtefactError(
            f"reshape: expected what shape_state returned, got {complaint(error)}. Take another checkpoint."
        ) from error
