"""Folding: weights that a layer computes from its parameters become parameters themselves.

Examples are weight norm (``g · v / ||v||``), spectral norm, and the standardised kernels of networks without
normalisation layers. If one input of such a layer is removed, the computed weights of all other inputs
change. If the computed weight itself is the parameter, they do not. So such layers are *folded*, in a copy of
the model, before anything is removed. The copy computes the same.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
_TOLERANCE = 1e-6
"""The largest relative difference of float64 results that count as equal."""


def foldable(model: nn.Module) -> tuple[str, ...]:
    """Find the weights to fold: those that do not follow their parameters position by position.

    Returns:
        Their names, such as ``conv1.weight``.
    """
    found = []
    for path, module in model.named_modules():
        names = [n for n in _parametrized(module) if not _follows(module, n)]
        names += [n for n in _hooked(module) if n not in names]
        if not names and _stand_in(module) is not None:
            names = ["weight"]
        found += [f"{path}.{name}".lstrip(".") for name in names]
    return tuple(found)


def folded(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Copy the model, with these computed weights as parameters. Without names, return the model itself.

    Args:
        model: The dense model; it is left as it was.
        names: Names of computed weights, as `foldable` returns them.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        >>> foldable(layer)
        ('weight',)
        >>> sorted(folded(layer, ["weight"]).state_dict())
        ['bias', 'weight']
    """
    if not names:
        return model
    found = _copied(model)
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = found.get_submodule(path)
        # In training mode, each pass may change a computed weight.
        training, module.training = module.training, False
        if leaf in _parametrized(module):
            _own_class(module)
            parametrize.remove_parametrizations(module, leaf)
        elif leaf in _hooked(module):
            _remove_hook(module, leaf)
        elif (stand_in := _stand_in(module)) is not None:
            module.__class__, module.__dict__ = type(stand_in), stand_in.__dict__
        module.training = training
    return found


def _own_class(module: nn.Module) -> None:
    """Give a module a class of its own. PyTorch removes the weight from the class, which others share."""
    shared = type(module)
    members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def _copied(model: nn.Module) -> nn.Module:
    memo = {id(t): t.detach().clone() for m in model.modules() for t in _computed_attributes(m)}
    return copy.deepcopy(model, memo)


def _parametrized(module: nn.Module) -> list[str]:
    return list(cast(nn.ModuleDict, module.parametrizations)) if parametrize.is_parametrized(module) else []


def _follows(module: nn.Module, name: str) -> bool:
    """Whether zeros at a position of the parameter make zeros there in the weight, and change nothing else.

    This is tried on a copy, for one position along each axis.
    """
    module = _copied(module).double().eval()
    origin = getattr(getattr(module.parametrizations, name), "original", None)
    with torch.no_grad():
        before = getattr(module, name).clone()
    if not isinstance(origin, Tensor) or origin.shape != before.shape:
        return False
    values = origin.detach().clone()
    for axis, size in enumerate(before.shape):
        if size > 1:
            wanted = before.index_fill(axis, torch.tensor([0], device=before.device), 0)
            with torch.no_grad():
                origin.copy_(values.index_fill(axis, torch.tensor([0], device=before.device), 0))
                if not _equal(getattr(module, name), wanted):
                    return False
    return True


def _hooked(module: nn.Module) -> list[str]:
    """Return the weights that a hook computes before each call: PyTorch's older weight and spectral norms."""
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    return [
        hook.name
        for hook in hooks
        if type(hook).__module__.startswith("torch.nn.utils.") and hasattr(hook, "compute_weight")
    ]


def _remove_hook(module: nn.Module, name: str) -> None:
    for remove in (nn.utils.remove_weight_norm, nn.utils.remove_spectral_norm):
        with contextlib.suppress(ValueError):  # the hook is of the other kind
            remove(module, name)
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):  # PyTorch leaves this hook behind, and it makes loading fail
        if type(getattr(hook, "hook", hook)).__module__ == "torch.nn.utils.spectral_norm":
            del hooks[key]


def _computed_attributes(module: nn.Module) -> list[Tensor]:
    """Return the tensors that hooks computed last. They have a history, so `copy.deepcopy` refuses them."""
    found = (vars(module).get(name) for name in _hooked(module))
    return [t for t in found if isinstance(t, Tensor) and not t.is_leaf]


class _RecordedWeights(torch.overrides.TorchFunctionMode):
    """Inside, the weights of all calls of linear layers and convolutions are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").startswith(("conv", "linear")):
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if isinstance(weight, Tensor):
                self.weights.append(weight)
        return func(*args, **kwargs)


def _stand_in(module: nn.Module) -> nn.Module | None:
    """Return one of PyTorch's own layers in place of a layer whose class only computes its weight otherwise.

    Returns:
        The layer, if it gives the same for two inputs. None if not: for example if the weight depends on the
        input, or the input is padded.
    """
    base = next((c for c in _LAYERS if isinstance(module, c)), None)
    if base is None or type(module).forward is base.forward or _parametrized(module) or _hooked(module):
        return None
    try:
        with torch.no_grad():
            trial, own = _copied(module).double(), cast(Tensor, module.weight)
            inputs = [_input(trial, seed) for seed in (0, 1)]
            weights = [_weight_used(trial, x) for x in inputs]
            if weights[0].shape != own.shape or _equal(weights[0], own.detach().double()):
                return None
            stand_in = _with_class(base, trial, weights[0])
            if all(_equal(stand_in(x), trial(x)) for x in inputs):
                return _with_class(base, module, weights[0].to(own.dtype))
    except Exception:  # the user's forward may need more than an input
        pass
    return None


def _weight_used(layer: nn.Module, x: Tensor) -> Tensor:
    with _RecordedWeights() as recorded:
        layer(x)
    (weight,) = recorded.weights
    found: Tensor = weight
    return found


def _input(layer: nn.Module, seed: int) -> Tensor:
    """Draw an input that a layer takes."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (2, layer.in_features)
    else:
        sizes = zip(layer.kernel_size, layer.dilation, strict=True)  # type: ignore[arg-type]
        shape = (2, layer.in_channels, *(2 * k * d + 5 for k, d in sizes))  # type: ignore[arg-type]
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(layer.weight.device)  # type: ignore[arg-type]


def _with_class(base: type[nn.Module], module: nn.Module, weight: Tensor) -> nn.Module:
    """Make a layer of another class with the attributes and hooks of a module, this weight, and its bias."""
    new = copy.copy(module)
    new.__class__ = base
    new.__dict__ = dict(vars(module))
    learnt = cast(Tensor, module.weight).requires_grad
    parameter = nn.Parameter(weight.clone(), requires_grad=learnt)
    new._parameters = {"weight": parameter, "bias": module._parameters["bias"]}
    new._buffers = {}
    return new


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())
