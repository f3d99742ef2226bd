"""Errors for models that have nothing to prune: why, and what the user can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from secateur.errors import NothingToPruneError, SettingError
from secateur.graph.groups import Frozen, Left
from secateur.graph.rules.op import COMPUTED
from secateur.graph.walk import UNREAD

_INPUT_OR_OUTPUT = ("model input", "model output")
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
_HOOKS = {
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
}


def nothing_to_prune(
    model: nn.Module, frozen: Iterable[Frozen], left: Iterable[Left], table: str
) -> NothingToPruneError:
    """Make the error for a model in which no unit may be removed. It says why.

    Args:
        model: What was traced.
        frozen: The parts of tensors that may not shrink, and why.
        left: The groups of which no unit may be removed, and why.
        table: The whole graph as text, for the details of the error.
    """
    frozen = [one for one in frozen if not one.reason.startswith(_INPUT_OR_OUTPUT)]
    left = list(left)
    stopped = [one.tensor for one in frozen] + [piece.tensor for one in left for piece in one.group.slices]
    parts = [_computed(model, stopped) or _frozen(frozen), _left(left)]
    if not any(parts):
        parts = [
            "Every layer reads the input or writes the output, and these keep their size. Prune single "
            'weights instead: granularity="weight".'
        ]
    return NothingToPruneError(
        f"trace: expected {type(model).__name__} to have units that can be removed, found none. "
        + " ".join(filter(None, parts)),
        table,
    )


def require_plain_code(model: nn.Module) -> None:
    """Refuse scripted modules, which hold no Python code, and quantised ones, which hold no plain tensors.

    Raises:
        SettingError: The model is such a module, or holds one.
    """
    for path, module in model.named_modules():
        at = f"{path!r}" if path else "the model itself"
        if isinstance(module, torch.jit.ScriptModule):
            raise SettingError(
                f"trace: expected modules with Python code, got {type(module).__name__} at {at}, which "
                f"torch.jit.script or torch.jit.trace made. Prune the module before it is scripted or traced."
            )
        if type(module).__module__.startswith(_QUANTISED):
            raise SettingError(
                f"trace: expected modules with plain weights, got a quantised {type(module).__name__} at "
                f"{at}. Prune the model first, and quantise the result."
            )


def require_no_masks(model: nn.Module) -> None:
    """Refuse a model that has masks of `torch.nn.utils.prune`.

    With a mask, each call computes the weight anew, and no signal would see its zeros.

    Raises:
        SettingError: The model has such a mask.
    """
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                raise SettingError(
                    f"trace: expected plain weights, got a mask of torch.nn.utils.prune on "
                    f"{f'{path}.{name}'.lstrip('.')!r}. Make it permanent first: "
                    f"torch.nn.utils.prune.remove({_module(path)}, {name!r})."
                )


def _computed(model: nn.Module, stopped: Iterable[str]) -> str:
    """Name a weight that each call computes from others and that blocks pruning, and say how to fix it."""
    for path, module in model.named_modules():
        if not any(name.startswith(f"{path}.") or not path for name in stopped):
            continue
        if parametrize.is_parametrized(module):
            name = next(iter(module.parametrizations))
            return _remedy(path, name, "torch.nn.utils.parametrize.remove_parametrizations")
        for hook in module._forward_pre_hooks.values():
            if type(hook) in _HOOKS:
                return _remedy(path, hook.name, _HOOKS[type(hook)])
    return ""


def _remedy(path: str, name: str, function: str) -> str:
    weight = f"{path}.{name}".lstrip(".")
    return (
        f"{weight} is computed anew by each call. Make it plain first: {function}({_module(path)}, {name!r})."
    )


def _module(path: str) -> str:
    return f"model.get_submodule({path!r})" if path else "model"


def _frozen(frozen: Sequence[Frozen]) -> str:
    """Name the operators that have no rule, and those that need every unit."""
    without_rule = [one for one in frozen if one.reason.startswith(("no rule", "the rule"))]
    others = [one for one in frozen if one not in without_rule]
    unread = any(UNREAD in one.reason for one in others)
    advice = (
        "If a method reads it, name that in methods=; if other inputs do, pass more_inputs=."
        if unread
        else ""
    )
    parts = [
        _kept(without_rule, "A rule is missing or does not cover this", "Write it: see CONTRIBUTING."),
        _kept(others, "Every unit has to stay", advice),
    ]
    return " ".join(filter(None, parts))


def _kept(frozen: Sequence[Frozen], cause: str, advice: str) -> str:
    """Name the reason that keeps the most tensors whole, and its place."""
    reasons = Counter((one.reason, one.where) for one in frozen)
    if not reasons:
        return ""
    (reason, where), _ = reasons.most_common(1)[0]
    tensor = next(one.tensor for one in frozen if one.reason == reason)
    at = f" at {_cut(where, 70)}" if where else ""
    reached = f"which {_cut(tensor, 60)} reaches{_more(reasons)}"
    return f"{cause}: {_cut(reason, 80)}{at}, {reached}. {advice}".rstrip()


def _left(left: Sequence[Left]) -> str:
    """Name the groups that an operator mixes, and those that stay whole for another reason."""
    mixed = [one for one in left if one.group.inexact_because]
    other = [one for one in left if not one.group.inexact_because]
    computed = any(COMPUTED in one.reason for one in mixed)
    advice = "Make that weight a parameter, or pass" if computed else "Pass"
    parts = [
        _largest(mixed, "An operator mixes the units", 125),
        f"{advice} allow_inexact=True to remove such units." if mixed else "",
        _largest(other, "Left alone", 300),
    ]
    return " ".join(filter(None, parts))


def _largest(left: Sequence[Left], cause: str, most: int) -> str:
    if not left:
        return ""
    largest = max(left, key=lambda one: one.group.size)
    units = f"{_cut(largest.group.name, 60)} ({largest.group.size} units)"
    return f"{cause}: {units}, {_cut(largest.reason, most)}{_more(left)}."


def _more(of: Collection[object]) -> str:
    return f", and {len(of) - 1} more" if len(of) > 1 else ""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
