"""Which layers of a model can become two, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from secateur.targets.lowrank.pair import LowRank, is_transposed, most_directions

_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes of every module."""

_OF_LAYERS = frozenset({*vars(nn.Linear(1, 1)), *vars(nn.Conv2d(1, 1, 1)), "nf", "nx"})
"""Attributes of linear layers and convolutions, with those of Transformers' ``Conv1D``."""


def replaceable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that can become two layers, by path; and for each other linear layer, why it cannot.

    A linear layer can: `nn.Linear`, Transformers' ``Conv1D``, `nn.Conv2d` with a kernel of 1 and one group.

    Args:
        model: Any model. What is inside a `LowRank` is left out.
    """
    inside = tuple(f"{p}." for p, m in model.named_modules() if isinstance(m, LowRank))
    users = _users(model)
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if not is_linear(module) or path.startswith(inside):
            continue
        why = next(_obstacles(path, module, users), "")
        if why:
            reasons[path] = why
        else:
            found[path] = module
    return found, reasons


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies with one matrix, if its class adds nothing to that."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or is_transposed(module)


def _users(model: nn.Module) -> dict[int, list[str]]:
    """The paths of the attributes that have each module or parameter, by its id."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
        for name, value in vars(module).items():
            if name not in _INTERNAL:
                for each in _inside(value):
                    found.setdefault(id(each), []).append(f"{path}.{name}".lstrip("."))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _inside(value: Any) -> Iterator[object]:
    """Modules and parameters that an attribute holds, in a list or as the owner of a method too."""
    items = value.values() if isinstance(value, Mapping) else value
    for item in items if isinstance(value, (list, tuple, Mapping)) else [value]:
        owner = getattr(item, "__self__", item)
        if isinstance(owner, (nn.Module, nn.Parameter)):
            yield owner


def _obstacles(path: str, module: nn.Module, users: dict[int, list[str]]) -> Iterator[str]:
    if not path:
        yield "it is the whole model"
    if type(module) not in (nn.Linear, nn.Conv2d) and not is_transposed(module):
        yield f"{type(module).__name__} is a class of its own, whose code may read the weight"
    if parametrize.is_parametrized(module):
        yield "its weight is computed: a parametrization"
    if len(users[id(module)]) > 1:
        yield f"it is also {_other(users[id(module)], path)}"
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        yield "its weight is no parameter of real numbers"
    for name in ("weight", "bias"):
        tensor = getattr(module, name)
        if tensor is not None and len(users.get(id(tensor), ())) > len(users[id(module)]):
            yield f"its {name} is shared with {_other(users[id(tensor)], f'{path}.{name}')}"
    own = {name for name in {*vars(module)} - _OF_LAYERS if not name.startswith("_")} - {"forward"}
    if own:
        yield f"it has attributes of its own: {', '.join(sorted(own))}"
    if {*dict(module.named_parameters(recurse=False))} - {"weight", "bias"}:
        yield "it holds further parameters"
    if "forward" in vars(module) or any(
        getattr(module, hooks)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ):
        yield "it has hooks, which would read other tensors"
    if isinstance(module, nn.Conv2d) and (module.padding not in ((0, 0), "valid")):
        yield "it pads its input"
    if most_directions(module) < 1:
        yield "it is too small for two layers to save anything"


def _other(names: list[str], own: str) -> str:
    return next((name for name in names if name != own), names[0])
