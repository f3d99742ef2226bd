"""Save and load pruned models: safetensors and JSON, nothing that runs code.

An artefact is a folder with ``model.safetensors`` and ``secateur.json``. The JSON holds the plan, the
form, versions, the tensors' checksum and its own. A save that is interrupted leaves the old artefact or the
new one: see `secateur.artefact.pair`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from secateur.artefact.content import FORMAT, Content, digest, opened_artefact
from secateur.artefact.pair import RECORD, TENSORS, folder_in_place
from secateur.artefact.unsaved import other_numbers, unsaved
from secateur.common.caches import without_caches
from secateur.common.mapped import check_kind, is_mapped
from secateur.common.models import device_of, named_tensors, unwrap
from secateur.common.modes import require_numbers
from secateur.common.paths import path_named
from secateur.common.tensorfile import checksum
from secateur.errors import ArtefactError, PlanError, SecateurError, SettingError
from secateur.graph.folding import folded
from secateur.graph.graph import fingerprint
from secateur.graph.trace import retrace
from secateur.plan import Plan
from secateur.targets.blocks.remove import rebuilt
from secateur.targets.lowrank.opened import GRANULARITIES as RANKS
from secateur.targets.lowrank.opened import opened
from secateur.targets.together.apply import cut_experts
from secateur.targets.together.blocks import without_blocks
from secateur.targets.together.graph import part
from secateur.targets.units.graph_form.program import smaller_program
from secateur.targets.units.graph_form.traced import Traced
from secateur.targets.units.later_calls.callcheck import check_calls
from secateur.targets.units.later_calls.flagged import Refused, guard
from secateur.targets.units.masked import masked
from secateur.targets.units.module_form.mended import mend
from secateur.targets.units.module_form.module import smaller_module
from secateur.targets.units.module_form.realise import find_changes
from secateur.targets.units.record import Record, attach, record_of
from secateur.targets.units.tensors import check_positions

_EXTRA = "_extra_state"

_MOST_BYTES = 1 << 30
"""Bytes that an artefact's tensors may have, beside eight for each number of the dense model: extra state."""


def save(small: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a pruned model, atomically.

    Args:
        small: The model that `apply`, `repair` or `prune` returned.
        directory: The folder. It is created if needed; an artefact in it is replaced.

    Returns:
        The folder.

    Raises:
        ArtefactError: The model did not come from `apply`, a module's `get_extra_state` returns something
            that neither JSON nor a tensor can hold, or nothing can be written there. An older artefact is
            not changed then.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> small = sc.apply(net, plan)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     sorted(path.name for path in sc.save(small, directory).iterdir())
        ['model.safetensors', 'secateur.json']
    """
    record = record_of(small)
    folder = path_named("save", directory)
    tensors, tied = _without_ties(small)
    extra_state, kept = _extra_state(small), unsaved(small)
    with folder_in_place(folder) as partial:
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        with (partial / TENSORS).open("rb") as file:
            sha256 = checksum(file)
        content: dict[str, Any] = {
            "format": FORMAT,
            "secateur": record.plan.secateur,
            "torch": torch.__version__,
            "form": record.form,
            "note": record.note,
            "repairs": list(record.repairs),
            "sizes": record.sizes,
            "captured": list(record.captured),
            "takes": record.takes,
            **({"stand_ins": record.stand_ins} if record.stand_ins else {}),
            **({"numbers": record.numbers} if record.numbers else {}),
            **({"flags": [asdict(flag) for flag in record.flags]} if record.flags else {}),
            "tied": tied,
            "extra_state": extra_state,
            **({"unsaved": {k: v.model_dump(mode="json") for k, v in kept.items()}} if kept else {}),
            "tensors_sha256": sha256,
            "plan": json.loads(record.plan.to_json()),
        }
        content["record_sha256"] = digest(content)
        (partial / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder


def load(
    directory: str | os.PathLike[str], make_model: Callable[[], nn.Module], *, example_inputs: Any = None
) -> nn.Module:
    """Read a pruned model back, bit for bit. Nothing in the artefact is executed.

    Args:
        directory: The folder that `save` wrote.
        make_model: A function that makes the dense model that was pruned. Its weights do not matter.
        example_inputs: For form ``graph``, which is captured again. Default: made from the saved shapes.

    Returns:
        The pruned model, in the mode of the model that `make_model` returns; in evaluation mode, if it is a
        captured program without training mode.

    Raises:
        ArtefactError: A file is missing, damaged, altered, not from secateur or from a newer version; or the
            model is another one.
        SettingError: `make_model` is no function.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import secateur as sc
        >>> def make_model():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = make_model()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> small = sc.apply(net, plan)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     loaded = sc.load(sc.save(small, directory), make_model)
        >>> x = torch.randn(3, 4)
        >>> torch.equal(loaded(x), small(x))
        True
    """
    folder = path_named("load", directory)
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise SettingError(
            f"load: expected a function that makes the dense model, got {type(make_model).__name__}. Write "
            "sc.load(directory, lambda: model)."
        )
    require_numbers("load", torch.device("cpu"))  # files are read to the CPU
    model = unwrap(make_model())
    numbers = sum(tensor.numel() for tensor in named_tensors(model).values())
    with opened_artefact(folder, _MOST_BYTES + 8 * numbers) as (content, file):
        tensors = file.tensors()
    if content.form == "graph" and (held := [*_with_extra_state(model)]):
        raise ArtefactError(
            f"load({folder}): expected a model without get_extra_state, which a captured program does not "
            f"hold, got {type(held[0][1]).__name__}. Apply the plan with form='module', and save that."
        )
    with _errors_from_content(folder):
        _set_extra_state(model, tensors, content)
        plan = Plan.from_json(json.dumps(content.plan))
        plan.check(fingerprint(model))
        known = plan
        if plan.granularity in RANKS:
            found = opened(model, plan)
            model, known = found.model, found.plan.model_copy().of_graph()  # by the names of that model
        with without_caches(model, lambda: known.inputs.arguments(example_inputs, device_of(model))):
            dense = folded(model, plan.folded)
            check_positions(dense, known)
            small = _shape(model, dense, known, content, example_inputs)
    _fill(small, tensors, content.tied, folder)
    _require_same_constants(small, plan, content, example_inputs, folder)
    record = _record(content, plan)
    with _errors_from_content(folder):
        guard(small, record.flags)
    if record.form == "module":
        check_calls(small, plan)
    return attach(small, record)


def _require_same_constants(
    small: nn.Module, plan: Plan, content: Content, example_inputs: Any, folder: Path
) -> None:
    """Check the tensors that no state dict holds: they must be as in the saved model.

    Raises:
        ArtefactError: One of them differs and changes the outputs.
    """
    if not content.unsaved:
        return
    inputs = getattr(plan, "inputs", None)
    arguments = None if inputs is None else inputs.arguments(example_inputs, device_of(small))
    if name := other_numbers(small, content.unsaved, arguments):
        raise ArtefactError(
            f"load({folder}): expected make_model() to make {name} as in the model that was saved, got other "
            f"numbers. It is neither a parameter nor a saved buffer, so no artefact holds it. "
            f"Register it with register_buffer before pruning, or set the random seed in make_model()."
        )


@contextmanager
def _errors_from_content(folder: Path) -> Iterator[None]:
    """Turn errors inside the block, about a record's content, into an ArtefactError that names the folder."""
    try:
        yield
    except PlanError as error:
        raise ArtefactError(f"load({folder}): {error}") from error
    except SecateurError:
        raise
    except Exception as error:  # modules may fail in any way on a state or size of another model
        raise ArtefactError(
            f"load({folder}): expected {RECORD} to fit the model that make_model() makes, got "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. Pass the function that made the "
            "model that was pruned."
        ) from error


def saved_record(directory: str | os.PathLike[str]) -> Record:
    """Read an artefact's record: how it was made, without the tensors.

    Raises:
        ArtefactError: There is no artefact, or it is damaged.
        PlanError: A newer version wrote the plan.
    """
    with opened_artefact(path_named("artefact", directory)) as (content, _):
        pass
    return _record(content, Plan.from_json(json.dumps(content.plan)))


def _record(content: Content, plan: Plan) -> Record:
    return Record(
        plan,
        content.form,
        content.note,
        content.repairs,
        content.sizes,
        content.captured,
        content.takes,
        content.stand_ins,
        tuple(Refused(**dict(flag)) for flag in content.flags),
        content.numbers,
    )


def _shape(
    model: nn.Module, dense: nn.Module, plan: Plan, content: Content, example_inputs: Any
) -> nn.Module:
    """Give the model the shapes of the plan, without the saved values.

    Args:
        model: The model that `make_model` made.
        dense: The same with folded weights as parameters, if the plan has some.
        plan: The plan.
        content: The content of the record.
        example_inputs: See `load`.
    """
    if plan.granularity == "unit+expert" and content.captured:  # code is rewritten before experts are removed
        known = plan.model_copy().of_graph()  # parts of the plan keep its costs
        units = _shape(model, dense, part(known, "unit"), content, example_inputs)
        return cut_experts(units, dense, plan, content.sizes)
    if plan.granularity == "block":
        return rebuilt(dense, plan, content.stand_ins, content.sizes)
    if plan.granularity == "unit+block":
        base = rebuilt(dense, part(plan, "block"), content.stand_ins, content.numbers)
        return _shape(base, base, without_blocks(dense, plan, content.stand_ins), content, example_inputs)
    if content.form == "masked":
        return masked(dense, plan)
    if content.form == "module" and not content.captured:
        return smaller_module(dense, plan, content.sizes)
    args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
    exact = all(g.exact for g in plan.groups)
    graph = retrace(model, plan.inputs, (args, kwargs), folds=plan.folded, allow_inexact=not exact)
    plan.check_graph(graph)
    if content.form == "graph":
        return smaller_program(Traced(dense, graph), plan, may_stay_in_evaluation=True)
    sizes, codes, _ = find_changes(dense, graph, plan)
    small = smaller_module(dense, plan, {**content.sizes, **sizes})
    mend(small, codes)
    return small


def _with_extra_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that have an extra state, with their paths."""
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield path, module


def _set_extra_state(model: nn.Module, tensors: dict[str, torch.Tensor], content: Content) -> None:
    for path, module in _with_extra_state(model):
        name = f"{path}.{_EXTRA}" if path else _EXTRA
        if name in tensors or path in content.extra_state:
            module.set_extra_state(tensors[name] if name in tensors else content.extra_state[path])


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """Return each module's extra state that is no tensor; tensors are in the state dict.

    Raises:
        ArtefactError: JSON cannot hold it.
    """
    found: dict[str, Any] = {}
    for path, module in _with_extra_state(model):
        value = module.get_extra_state()
        if isinstance(value, torch.Tensor):
            continue
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ArtefactError(
                f"save: expected {path or 'the model'}.get_extra_state() to return a tensor, or plain data "
                f"for JSON (keys must be texts), got {type(value).__name__}. Return one of these."
            )
        found[path] = value
    return found


def _without_ties(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors to write, and the names of tied ones: safetensors refuses shared storage."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in named_tensors(model).items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        # A tensor in a file of its own is not copied: copies of all might not fit into memory.
        alone = is_mapped(tensor) and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor.detach().to("cpu", copy=not alone).contiguous()
    return tensors, tied


def _fill(small: nn.Module, tensors: dict[str, torch.Tensor], tied: dict[str, str], folder: Path) -> None:
    own = {n: t for n, t in small.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    if set(own) != set(tensors) | set(tied) or not set(tied.values()) <= set(tensors):
        odd = sorted(set(own) ^ (set(tensors) | set(tied)))
        raise ArtefactError(
            f"load({folder}): expected the tensors of the model that make_model() makes, got a difference in "
            f"{', '.join(odd[:5])}. Pass the function that made the model that was pruned."
        )
    empty: dict[int, list[tuple[str, torch.Tensor]]] = {}
    sources: dict[int, str] = {}
    for name, target in own.items():
        source = tied.get(name, name)
        stored, other = tensors[source], sources.setdefault(id(target), source)
        if other != source and not torch.equal(tensors[other], stored):
            raise ArtefactError(
                f"load({folder}): expected {other} and {name} to be separate tensors, as in the model that "
                "was saved, got a model in which they are tied. Make it without that tie: with "
                "config.tie_word_embeddings = False, for example."
            )
        if stored.shape != target.shape:
            raise ArtefactError(
                f"load({folder}): expected {name} of shape {tuple(target.shape)}, got {tuple(stored.shape)}. "
                f"Save the model again: these tensors do not belong to the plan."
            )
        check_kind(f"load({folder})", name, target, stored)
        if target.is_meta:
            empty.setdefault(id(target), []).append((name, stored))
        else:
            target.data = stored.to(target.device)
    _replace_empty(small, own, empty, folder)


def _replace_empty(
    small: nn.Module,
    own: dict[str, torch.Tensor],
    empty: dict[int, list[tuple[str, torch.Tensor]]],
    folder: Path,
) -> None:
    """Replace tensors on the meta device, which have no memory. Tied ones stay tied."""
    for places in empty.values():
        first, stored = places[0]
        is_parameter = isinstance(own[first], nn.Parameter)
        new = nn.Parameter(stored, requires_grad=own[first].requires_grad) if is_parameter else stored
        for name, _ in places:
            path, _, leaf = name.rpartition(".")
            setattr(small.get_submodule(path), leaf, new)
    left = [name for name, buffer in small.named_buffers() if buffer.is_meta]
    if left:
        raise ArtefactError(
            f"load({folder}): expected make_model() to make the buffers that no artefact holds, got "
            f"{left[0]} on the meta device. Make the model inside secateur.empty_weights() instead."
        )
