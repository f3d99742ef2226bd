"""Save and load pruned models: safetensors and JSON, nothing that runs code.

An artefact is a folder with ``model.safetensors`` and ``secateur.json``. The JSON holds the plan, the
form, versions, the tensors' checksum and its own. Both files are written beside their final names and
then renamed, tensors first; a reader that finds the old JSON beside the new tensors takes the JSON that
waits beside it. So an interrupted save leaves the old artefact or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.common.mapped import is_mapped
from secateur.common.models import device_of, named_tensors, unwrap
from secateur.errors import ArtefactError, PlanError
from secateur.graph.folding import folded
from secateur.graph.graph import fingerprint
from secateur.graph.trace import retrace
from secateur.plan import Plan
from secateur.targets.together.apply import cut_experts
from secateur.targets.together.graph import GRANULARITY, part
from secateur.targets.units.masked import masked
from secateur.targets.units.mended import mend
from secateur.targets.units.module import smaller_module
from secateur.targets.units.program import smaller_program
from secateur.targets.units.realise import understood
from secateur.targets.units.record import Form, Record, attach, record_of
from secateur.targets.units.tensors import check_positions
from secateur.targets.units.traced import Traced

FORMAT = 1
_EXTRA = "_extra_state"
TENSORS, RECORD, WAITING = "model.safetensors", "secateur.json", ".secateur.json.waiting"


class _Content(BaseModel):
    """What ``secateur.json`` holds, beside its own checksum."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    secateur: str
    torch: str
    form: Form
    note: str
    repairs: tuple[dict[str, Any], ...]
    sizes: dict[str, bool | int | float | list[int]]
    captured: tuple[str, ...]
    takes: str = ""
    tied: dict[str, str]
    extra_state: dict[str, Any] = {}
    tensors_sha256: str
    plan: dict[str, Any]


def save(small: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a pruned model, atomically.

    Args:
        small: What `apply`, `repair` or `prune` returned.
        directory: A folder; made if it does not exist, an artefact in it is replaced.

    Returns:
        The folder.

    Raises:
        ArtefactError: If the model did not come from `apply`, or a module's `get_extra_state` returns what
            neither JSON nor a tensor can hold.

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
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, tied = _without_ties(small)
    temporary = folder / f".{TENSORS}.{os.getpid()}"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
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
            "tied": tied,
            "extra_state": _extra_state(small),
            "tensors_sha256": _sha256(temporary),
            "plan": json.loads(record.plan.to_json()),
        }
        content["record_sha256"] = _digest(content)
        waiting = folder / WAITING
        waiting.write_text(json.dumps(content, indent=1) + "\n")
        os.chmod(temporary, waiting.stat().st_mode)  # safetensors makes files that only the owner can read
        os.replace(temporary, folder / TENSORS)
        os.replace(waiting, folder / RECORD)
    finally:
        temporary.unlink(missing_ok=True)
    return folder


def load(
    directory: str | os.PathLike[str], make_model: Callable[[], nn.Module], *, example_inputs: Any = None
) -> nn.Module:
    """Read a pruned model back, bit for bit. Nothing in the artefact is executed.

    Args:
        directory: What `save` wrote.
        make_model: Makes the dense model that was pruned; its weights do not matter.
        example_inputs: For form ``graph``, which is captured anew; made from the saved shapes if not given.

    Returns:
        The pruned model, in the mode that `make_model` left it in; in evaluation mode, if it is a captured
        program that knows no other.

    Raises:
        ArtefactError: If a file is missing, damaged, altered, foreign or newer, or the model is another.

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
    folder = Path(directory)
    content = _read(folder)
    model, tensors = unwrap(make_model()), load_file(folder / TENSORS)
    if content.form == "graph" and (held := [*_with_extra_state(model)]):
        raise ArtefactError(
            f"load({folder}): expected a model without get_extra_state, which a captured program does not "
            f"hold, got {type(held[0][1]).__name__}. Apply the plan with form='module', and save that."
        )
    _set_extra_state(model, tensors, content)
    try:
        plan = Plan.from_json(json.dumps(content.plan))
        plan.check(fingerprint(model))
        dense = folded(model, plan.folded)
        check_positions(dense, plan)
    except PlanError as error:
        raise ArtefactError(f"load({folder}): {error}") from error
    small = _shape(model, dense, plan, content, example_inputs)
    _fill(small, tensors, content.tied, folder)
    return attach(small, _record(content, plan))


def saved_record(directory: str | os.PathLike[str]) -> Record:
    """What an artefact says of how it was made, without its tensors.

    Raises:
        ArtefactError: There is no artefact, or it is damaged.
        PlanError: A newer version wrote the plan.
    """
    content = _read(Path(directory))
    return _record(content, Plan.from_json(json.dumps(content.plan)))


def _record(content: _Content, plan: Plan) -> Record:
    return Record(
        plan,
        content.form,
        content.note,
        content.repairs,
        content.sizes,
        content.captured,
        content.takes,
    )


def _shape(
    model: nn.Module, dense: nn.Module, plan: Plan, content: _Content, example_inputs: Any
) -> nn.Module:
    """`dense`: the model with the plan's computed weights as parameters."""
    if plan.granularity == GRANULARITY and content.captured:  # calls are mended while all experts are there
        units = _shape(model, dense, part(plan, "unit"), content, example_inputs)
        return cut_experts(units, dense, plan, content.sizes)
    if content.form == "masked":
        return masked(dense, plan)
    if content.form == "module" and not content.captured:
        return smaller_module(dense, plan, content.sizes)
    args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
    exact = all(g.exact for g in plan.groups)
    graph = retrace(model, plan.inputs, (args, kwargs), folds=plan.folded, allow_inexact=not exact)
    if content.form == "graph":
        return smaller_program(Traced(dense, graph), plan, may_stay_in_evaluation=True)
    sizes, codes = understood(dense, graph, plan)
    small = smaller_module(dense, plan, {**content.sizes, **sizes})
    mend(small, codes)
    return small


def _with_extra_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold more than tensors, with their paths."""
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield path, module


def _set_extra_state(model: nn.Module, tensors: dict[str, torch.Tensor], content: _Content) -> None:
    for path, module in _with_extra_state(model):
        name = f"{path}.{_EXTRA}" if path else _EXTRA
        if name in tensors or path in content.extra_state:
            module.set_extra_state(tensors[name] if name in tensors else content.extra_state[path])


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """By module, what `get_extra_state` returns, if that is no tensor: those are with the others.

    Raises:
        ArtefactError: If JSON cannot hold it.
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
                f"save: expected {path or 'the model'}.get_extra_state() to return a tensor, or what JSON "
                f"can hold (dictionaries have texts as keys), got {type(value).__name__}. Return such."
            )
        found[path] = value
    return found


def _without_ties(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to write, and the names that share another's tensor: safetensors refuses shared storage."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in named_tensors(model).items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        # One in a file of its own is written from there: a copy of all might not fit into memory.
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
    # Copies: what was read may be mapped from the file, which a later save replaces; and some kernels add in
    # an order that depends on how their operands are aligned, which in a file is another than in memory.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    empty: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, target in own.items():
        stored = tensors[tied.get(name, name)]
        if stored.shape != target.shape:
            raise ArtefactError(
                f"load({folder}): expected {name} of shape {tuple(target.shape)}, got {tuple(stored.shape)}. "
                f"The file does not belong to this plan."
            )
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
    """Put tensors in the place of those on the meta device, which cannot be filled; tied ones stay tied."""
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
            f"{left[0]} on "
            "the meta device. Make the model inside secateur.empty_weights() instead."
        )


def _read(folder: Path) -> _Content:
    """The record that belongs to the tensors in the folder."""
    if not (folder / TENSORS).is_file():
        raise ArtefactError(
            f"load({folder}): expected a folder with {TENSORS} and {RECORD}, got no {TENSORS}."
        )
    reasons = []
    for name in (RECORD, WAITING):
        try:
            return _checked(folder, name)
        except FileNotFoundError:
            reasons.append(f"no {name}")
        except _NewerError as error:
            raise ArtefactError(str(error)) from error
        except (ArtefactError, SafetensorError) as error:
            reasons.append(str(error))
    raise ArtefactError(f"load({folder}): {reasons[0]}. Save the model again.")


class _NewerError(Exception):
    pass


def _checked(folder: Path, name: str) -> _Content:
    try:
        content = json.loads((folder / name).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{name} is no JSON ({error})") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("format"), int)
        or "secateur" not in content
    ):
        raise ArtefactError(f"{name} is not secateur's: expected a mapping with 'format' and 'secateur'")
    if content["format"] > FORMAT:
        raise _NewerError(
            f"load({folder}): expected format {FORMAT} or older, got {content['format']}, written by "
            f"secateur {content['secateur']}. Upgrade secateur."
        )
    stated = content.pop("record_sha256", None)
    if stated != _digest(content):
        raise ArtefactError(f"{name} was altered: its checksum does not fit its content")
    try:
        found = _Content.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtefactError(f"{name} is malformed: {where}: {first['msg']}") from error
    if found.tensors_sha256 != _sha256(folder / TENSORS):
        raise ArtefactError(
            f"{TENSORS} is truncated, altered or from another save: its checksum does not fit {name}"
        )
    return found


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
