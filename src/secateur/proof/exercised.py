"""Find out which pruned tensors change the outputs: no comparison can show an error in the others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.common.mapped import stored_like
from secateur.common.models import evaluating
from secateur.common.outputs import tensors_of
from secateur.errors import ApplyError
from secateur.graph.answering import answering
from secateur.plan import Plan
from secateur.targets.units.compare import (
    PLAIN,
    Double,
    Way,
    doubled,
    largest,
    relative_difference,
)
from secateur.targets.units.draws import AnyDraws, NoDraws
from secateur.targets.units.tensors import kept, removed_positions, tensor_called

MOST_PERTURBATIONS = 64
"""Most forward passes that perturb one tensor each, where gradients show nothing."""


class Exercise:
    """Collects which pruned tensors have been seen to change the outputs.

    A tensor is exercised if some position of it changes the outputs: a change as large as the tensor's
    largest entry changes them by more than the tolerance. The change is a root mean square over the outputs,
    each relative to its own largest entry.

    Attributes:
        unread: Parameters of the pruned model that no gradient reached in any pass; None before the first.
        failed: Whether a backward pass raised an error.
        gradients: Gradients of the pruned model's parameters in the last pass, by name; None if it failed.
    """

    def __init__(self, model: nn.Module, small: nn.Module, plan: Plan, tolerance: float) -> None:
        """Begin with nothing exercised. `model` is the dense model, and `small` the pruned one."""
        self.unread: set[str] | None = None
        self.failed = False
        self.gradients: dict[str, torch.Tensor | None] | None = None
        self._tolerance = tolerance
        self._stays: dict[str, dict[int, NDArray[np.int64]]] = {}
        self._moved: dict[str, dict[int, NDArray[np.bool_]]] = {}
        self._reached: set[str] = set()
        self._tries = MOST_PERTURBATIONS
        for name, axes in removed_positions(plan).items():
            try:
                shape, now = tensor_called(model, name).shape, tensor_called(small, name).shape
            except ApplyError:  # a constant that forward() makes, or an expert that was removed whole
                continue
            stays = {a: np.flatnonzero(kept(shape[a], gone)) for a, gone in axes.items()}
            # In form `masked` the tensor has its dense shape, and only some entries are kept.
            self._stays[name] = {
                a: at if now[a] == shape[a] else np.arange(now[a]) for a, at in stays.items()
            }
            self._moved[name] = {a: np.zeros(len(at), dtype=bool) for a, at in self._stays[name].items()}

    @property
    def not_exercised(self) -> tuple[str, ...]:
        """The pruned tensors that have not changed the outputs in any pass."""
        return tuple(n for n, axes in self._moved.items() if not all(moved.any() for moved in axes.values()))

    @property
    def to_exercise(self) -> tuple[str, ...]:
        """Those that are not exercised and that another pass may exercise: all but the cancelled ones."""
        cancelled = self.cancelled
        return tuple(name for name in self.not_exercised if name not in cancelled)

    @property
    def is_half_exercised(self) -> bool:
        """Whether less than half of the kept positions of some pruned tensor have changed the outputs.

        Cancelled tensors do not count: no pass shows more of them.
        """
        cancelled = self.cancelled
        counts = self.counts().items()
        return any(2 * moved < stay for name, (moved, stay) in counts if name not in cancelled)

    @property
    def cancelled(self) -> tuple[str, ...]:
        """Those that no pass can exercise, because later operators cancel them.

        An example is a bias before a norm, or before a softmax over positions. The gradient reaches it and
        sums to zero; another tensor of the same layer, pruned at the same positions, changes the outputs.
        """
        return tuple(name for name in self.not_exercised if name in self._reached and self._has_sibling(name))

    def _has_sibling(self, name: str) -> bool:
        layer = name.rpartition(".")[0]
        cut = [at.tolist() for at in self._stays[name].values()]
        return any(
            other.rpartition(".")[0] == layer and other not in self.not_exercised and at.tolist() in cut
            for other, axes in self._stays.items()
            for at in axes.values()
        )

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each pruned tensor: how many kept positions changed the outputs, and how many there are."""
        return {
            name: (sum(int(m.sum()) for m in axes.values()), sum(len(m) for m in axes.values()))
            for name, axes in self._moved.items()
        }

    def by_gradients(
        self,
        small: Double,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draws: AnyDraws,
        way: Way = PLAIN,
    ) -> None:
        """Exercise tensors with one backward pass.

        Args:
            small: The pruned model.
            args: Positional arguments.
            kwargs: Keyword arguments.
            draws: The random numbers of the comparison.
            way: How the models ran.
        """
        self.gradients = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user did not ask for these gradients
                self._backward(small, args, kwargs, draws, way)
        except Exception:  # autograd may fail on a user's forward in any way
            self.failed = True

    def by_gradients_and_perturbation(
        self,
        small: Double,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draws: AnyDraws,
        way: Way = PLAIN,
    ) -> None:
        """Exercise tensors with a backward pass, and then perturb those that are still not exercised."""
        self.by_gradients(small, args, kwargs, draws, way)
        if self.to_exercise:
            self.by_perturbation(small, args, kwargs, draws, way)

    def _backward(
        self,
        small: Double,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draws: AnyDraws,
        way: Way,
    ) -> None:
        tensors, found = gradients(small, args, kwargs, draws, way, also=self._stays)
        self.gradients = {name: found[name] for name, _ in small.model.named_parameters() if name in found}
        unread = {name for name, gradient in found.items() if gradient is None}
        self.unread = unread if self.unread is None else self.unread & unread
        for name in self._stays:
            if (gradient := found.get(name)) is not None:
                self._add_gradient(name, gradient, tensors[name].detach())

    def _add_gradient(self, name: str, gradient: torch.Tensor, tensor: torch.Tensor) -> None:
        scale = largest(tensor) or 1.0
        for axis, at in self._stays[name].items():
            if len(at) < gradient.shape[axis]:
                gradient = gradient.index_select(axis, torch.as_tensor(at, device=gradient.device))
        if not math.isfinite(largest(gradient)):
            gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        if bool(gradient.any()):
            self._reached.add(name)
        for axis, moved in self._moved[name].items():
            rest = [a for a in range(gradient.ndim) if a != axis]
            each = torch.linalg.vector_norm(gradient, dim=rest) if rest else gradient.abs()
            moved |= (each * scale > self._tolerance).cpu().numpy()

    def by_perturbation(
        self,
        small: Double,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draws: AnyDraws,
        way: Way = PLAIN,
    ) -> None:
        """Exercise tensors by perturbing them and comparing outputs. Arguments as for `by_gradients`."""

        def moves(names: Iterable[str]) -> bool:
            tensors = {name: tensor_called(small.model, name).detach() for name in names}
            before_change = {name: tensor.clone() for name, tensor in tensors.items()}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # other numbers may lead to warnings
                    for name, tensor in tensors.items():
                        self._perturb(name, tensor)
                    got = small.run(args, kwargs, draws, way)
            except Exception:  # such as an index that is now out of range
                return True
            finally:
                for name, tensor in tensors.items():
                    tensor.copy_(before_change[name])
            return relative_difference(got, before) > self._tolerance

        before = small.run(args, kwargs, draws, way)
        left = self.to_exercise
        if not moves(left):
            return
        for name in left:
            if self._tries and (len(left) == 1 or moves([name])):
                for moved in self._moved[name].values():
                    moved |= True
            self._tries = max(0, self._tries - 1)

    def _perturb(self, name: str, tensor: torch.Tensor) -> None:
        """Change a tensor in place at all kept positions, as `perturbed_copy` does."""
        perturbed = perturbed_copy(tensor)
        with torch.no_grad():
            for axis, at in self._stays[name].items():
                gone = torch.as_tensor(~np.isin(np.arange(tensor.shape[axis]), at), device=tensor.device)
                perturbed = torch.where(_along(gone, axis, tensor.ndim), tensor, perturbed)
            tensor.copy_(perturbed)


def perturbed_copy(tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return a copy with other numbers, of the same sign and size; about 0.1 for 0. Integers are reversed."""
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.flip(tuple(range(tensor.ndim)))
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.device)
    return torch.where(tensor == 0, 0.1 * noise, tensor * (0.5 * noise).exp()).to(tensor.dtype)


def _along(mask: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    return mask.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _projected(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Return one number: a random projection of all outputs, each relative to its largest entry.

    A plain sum would not do: after a softmax or a norm it is constant.
    """
    total = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for output in outputs:
        if output.is_complex():
            output = torch.view_as_real(output.resolve_conj())
        if not output.is_floating_point():
            continue
        finite = output[torch.isfinite(output)]
        # Drawn anew for each output, so that both models get the same numbers for the same output.
        along = torch.randn(len(finite), generator=generator, dtype=torch.float64).to(finite.device)
        scale = float(finite.detach().abs().max()) if finite.numel() else 0.0
        if not finite.requires_grad or not scale:
            continue
        total = total.to(finite.device) + (finite * along).sum() / scale / math.sqrt(len(finite))
    return total


class _Followed(TorchFunctionMode):
    """Lets gradients pass ``detach`` and ``no_grad``, and reach the statistics of a batch norm."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            return None
        if func is torch.Tensor.detach:
            return args[0].view_as(args[0])
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func in (torch.batch_norm, torch.ops.aten.batch_norm.default):
            x, weight, bias, mean, var, training, momentum, eps = args[:8]
            return _batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        return func(*args, **kwargs)


def _batch_norm(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`F.batch_norm` with gradients for the statistics, which torch's own function refuses."""
    if training or mean is None or var is None:
        mean, var = (t.detach().clone() if t is not None else None for t in (mean, var))
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = (var + eps).rsqrt()
    y = (x - mean.reshape(shape)) * (scale if weight is None else scale * weight).reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


Found = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]
"""Tensors of a model by name, and the gradient of each; None if no gradient reached it."""


def gradients(
    double: Double,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: AnyDraws,
    way: Way = PLAIN,
    *,
    also: Iterable[str] = (),
) -> Found:
    """Run a forward and a backward pass in float64.

    Args:
        double: The model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        draws: The random numbers of the forward pass.
        way: How the model runs.
        also: Tensors that are no parameters, by name.

    Returns:
        The parameters and the tensors in `also` by name, and the gradient of a random projection of the
        outputs for each; None if no gradient reached it.
    """
    if isinstance(draws, NoDraws):
        with suppress(Exception):  # a user's forward or backward may fail in any way
            found = _gradients(double, args, kwargs, draws, way, also)
            if not draws.drew:
                return found
        draws = draws.watched
    return _gradients(double, args, kwargs, draws, way, also)


def _gradients(
    double: Double,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: AnyDraws,
    way: Way,
    also: Iterable[str],
) -> Found:
    model = double.model
    tensors = {**dict(model.named_parameters()), **{name: tensor_called(model, name) for name in also}}
    tensors = {name: t for name, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    before = {name: t.requires_grad for name, t in tensors.items()}
    args, kwargs = doubled(args, kwargs)
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> None:
        # Move each gradient to a file, if its tensor is in one: all together may not fit into memory.
        if tensor.grad is not None:
            found[id(tensor)], tensor.grad = stored_like(tensor.grad, tensor), None

    hooks = []
    try:
        with (
            evaluating(model, training=way.training, state=double.state),
            torch.enable_grad(),
            answering(way.answer),
        ):
            for tensor in {id(t): t for t in tensors.values()}.values():
                hooks.append(tensor.requires_grad_().register_post_accumulate_grad_hook(keep))
            with _Followed(), draws.shared(double=True):
                outputs = tensors_of(getattr(model, way.method or "__call__")(*args, **kwargs))
            total = _projected(outputs)
            with draws.in_double():
                total.backward(inputs=list(tensors.values()))
    finally:
        for hook in hooks:
            hook.remove()
        for name, tensor in tensors.items():
            tensor.requires_grad_(before[name])
    return tensors, {name: found.get(id(tensor)) for name, tensor in tensors.items()}
