"""The positions that an index or a selection reads, as in ``x[:, :8]`` or ``x.narrow(1, 0, 8)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from secateur.targets.units.module_form.call_sizes import Arguments, is_size
from secateur.targets.units.module_form.needs import Positions, Step


def index_steps(x: torch.Tensor, key: Any) -> list[Step]:
    """Return a step for each slice and number of an index, with its axis there; index tensors come last."""
    parts = components(key)
    consumed = sum(_consumes(part) for part in parts)
    steps: list[Step] = []
    tensors: list[tuple[int, int]] = []
    dim = 0
    for number, part in enumerate(parts):
        if part is Ellipsis:
            dim += x.ndim - consumed
        elif part is None or isinstance(part, bool):
            dim += 1
        elif isinstance(part, slice):
            if part != slice(None):
                steps.append(Step("take", dim, number))
            dim += 1
        elif is_size(part):
            steps.append(Step("take", dim, number))
        else:
            tensors.append((dim, number))
            dim += _consumes(part)
    if tensors:
        steps.append(Step("take", *tensors[0]))
    return steps


def _consumes(part: Any) -> int:
    """Return how many axes a component of an index stands for."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8):
        return part.ndim
    return 1


def components(key: Any) -> list[Any]:
    """The parts of an index: of ``x[:, 3]``, a slice and a number."""
    return list(key) if isinstance(key, tuple) else [key]


def positions_of(need: Positions) -> tuple[int, ...] | int:
    """The positions of a need; a number if it is a single one."""
    if need.single:
        return need.start
    return need.listed if need.listed is not None else tuple(range(need.start, need.stop))


def positions_read(name: str, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the positions that a step reads of its axis; a number if it is a single one."""
    component = component_of(name, step, args, kwargs)
    size = args[0].shape[own_axis(name, step, args)]
    if isinstance(component, slice):
        return tuple(range(*component.indices(size)))
    if isinstance(component, int):
        return component % size if size else component
    listed = torch.as_tensor(component)
    if listed.dtype is torch.bool:
        listed = listed.nonzero().flatten()
    return tuple(int(v) % max(size, 1) for v in listed.flatten().tolist())


def values_of(component: Any) -> tuple[int, ...]:
    """Return the values of an index that is a list or a tensor; none if it is a tensor without values yet."""
    abstract = isinstance(component, torch.Tensor) and (
        type(component) not in (torch.Tensor, torch.nn.Parameter) or component.is_meta
    )
    return () if abstract else tuple(torch.as_tensor(component).long().flatten().tolist())


def own_axis(name: str, step: Step, args: Sequence[Any]) -> int:
    """Return the axis of the tensor that a step reads: each number before it in an index removed one."""
    if name not in ("__getitem__", "__setitem__"):
        return step.dim
    before = components(args[1])[: step.part]
    numbers = sum(isinstance(p, int) and not isinstance(p, bool) for p in before)
    new = sum(p is None for p in before)
    return step.dim + numbers - new


def component_of(name: str, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a call passes for the axis of a step: a number, a slice, a list or a tensor."""
    if name in ("__getitem__", "__setitem__"):
        return components(args[1])[step.part]
    values = [*args[1:]]
    names = {
        "narrow": ("dim", "start", "length"),
        "select": ("dim", "index"),
        "index_select": ("dim", "index"),
    }
    given = dict(zip(names.get(name, ()), values, strict=False)) | kwargs
    if name == "narrow":
        return slice(given["start"], given["start"] + given["length"])
    return given["index"]


def with_positions(
    name: str, step: Step, need: Positions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    """Return the arguments of an index or a selection, with other positions."""
    x = args[0]
    listed = None if need.listed is None else torch.tensor(need.listed, device=x.device)
    component: Any = need.start if need.single else slice(need.start, need.stop) if listed is None else listed
    if name in ("__getitem__", "__setitem__"):
        parts = components(args[1])
        parts[step.part] = component
        return (x, tuple(parts), *args[2:]), kwargs
    if name == "narrow":
        return (x, step.dim, need.start, need.stop - need.start), {}
    if listed is None and not need.single:
        listed = torch.arange(need.start, need.stop, device=x.device)
    return (x, step.dim, need.start if need.single else listed), {}
