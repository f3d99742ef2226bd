"""Which of the tensors that a plan cut move the output: what does not, no comparison can see."""

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

from secateur.common.mapped import settled
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

SPOILED = 64
"""Most forward passes that try one tensor each, where gradients say nothing."""


class Exercise:
    """What has been seen to move the output so far.

    A position moves it where a change of the size of the tensor's largest entry changes the outputs, each
    relative to its own largest entry, by more than the tolerance in the root mean square.

    Attributes:
        unread: Parameters of the pruned model that no gradient reached in any pass; None before one did.
        failed: Whether a backward pass raised an error.
        gradients: Those of the pruned model's parameters in the last pass, by name; None if it failed.
    """

    def __init__(self, model: nn.Module, small: nn.Module, plan: Plan, tolerance: float) -> None:
        """See the class; `model` is the dense model and `small` the pruned one."""
        self.unread: set[str] | None = None
        self.failed = False
        self.gradients: dict[str, torch.Tensor | None] | None = None
        self._tolerance = tolerance
        self._stays: dict[str, dict[int, NDArray[np.int64]]] = {}
        self._moved: dict[str, dict[int, NDArray[np.bool_]]] = {}
        self._reached: set[str] = set()
        self._tries = SPOILED
        for name, axes in removed_positions(plan).items():
            try:
                shape, now = tensor_called(model, name).shape, tensor_called(small, name).shape
            except ApplyError:  # a constant made inside forward(), or an expert that went as a whole
                continue
            stays = {a: np.flatnonzero(kept(shape[a], gone)) for a, gone in axes.items()}
            # Form `masked` keeps the dense shape: there only some of the entries survive.
            self._stays[name] = {
                a: at if now[a] == shape[a] else np.arange(now[a]) for a, at in stays.items()
            }
            self._moved[name] = {a: np.zeros(len(at), dtype=bool) for a, at in self._stays[name].items()}

    @property
    def left(self) -> tuple[str, ...]:
        """The cut tensors that have not moved the output in any pass."""
        return tuple(n for n, axes in self._moved.items() if not all(moved.any() for moved in axes.values()))

    @property
    def unsettled(self) -> tuple[str, ...]:
        """Those of `left` that another pass may show: all but the cancelled."""
        cancelled = self.cancelled
        return tuple(name for name in self.left if name not in cancelled)

    @property
    def half_seen(self) -> bool:
        """Whether of some cut tensor less than half of the positions that stay moved the output.

        The cancelled are left out: no pass shows more of them.
        """
        cancelled = self.cancelled
        counts = self.counts().items()
        return any(2 * moved < stay for name, (moved, stay) in counts if name not in cancelled)

    @property
    def cancelled(self) -> tuple[str, ...]:
        """Those of `left` that nothing can show, because what follows cancels them.

        A bias in front of a softmax over positions or of a norm: the gradient reaches it and sums to nothing,
        while another tensor of the same layer, cut at the same positions, moves the output.
        """
        return tuple(name for name in self.left if name in self._reached and self._has_sibling(name))

    def _has_sibling(self, name: str) -> bool:
        layer = name.rpartition(".")[0]
        cut = [at.tolist() for at in self._stays[name].values()]
        return any(
            other.rpartition(".")[0] == layer and other not in self.left and at.tolist() in cut
            for other, axes in self._stays.items()
            for at in axes.values()
        )

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each cut tensor, how many of the positions that stay moved the output, and how many stay."""
        return {
            name: (sum(int(m.sum()) for m in axes.values()), sum(len(m) for m in axes.values()))
            for name, axes in self._moved.items()
        }

    def look(
        self,
        small: Double,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draws: AnyDraws,
        way: Way = PLAIN,
    ) -> None:
        """One backward pass.

        Args:
            small: The pruned model.
            args: Positional arguments.
            kwargs: Keyword arguments.
            draws: The random numbers of the comparison.
            way: How it ran.
        """
        self.gradients = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of gradients that the user did not ask for
                self._by_gradients(small, args, kwargs, draws, way)
        except Exception:  # autograd may fail on a user's forward in any way
            self.failed = True

    def look_closely(
        self,
        small: Double,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draws: AnyDraws,
        way: Way = PLAIN,
    ) -> None:
        """As `look`, and what no gradient reached is spoiled: one forward pass each tells."""
        self.look(small, args, kwargs, draws, way)
        if self.unsettled:
            self.spoil(small, args, kwargs, draws, way)

    def _by_gradients(
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
                self._note(name, gradient, tensors[name].detach())

    def _note(self, name: str, gradient: torch.Tensor, tensor: torch.Tensor) -> None:
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

    def spoil(
        self,
        small: Double,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draws: AnyDraws,
        way: Way = PLAIN,
    ) -> None:
        """Spoil what has not moved the output so far, and see whether it does; arguments as for `look`."""

        def moves(names: Iterable[str]) -> bool:
            tensors = {name: tensor_called(small.model, name).detach() for name in names}
            unspoiled = {name: tensor.clone() for name, tensor in tensors.items()}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what other numbers lead to
                    for name, tensor in tensors.items():
                        self._spoil(name, tensor)
                    got = small.run(args, kwargs, draws, way)
            except Exception:  # such as a position that is now outside of its table
                return True
            finally:
                for name, tensor in tensors.items():
                    tensor.copy_(unspoiled[name])
            return relative_difference(got, before) > self._tolerance

        before = small.run(args, kwargs, draws, way)
        left = self.unsettled
        if not moves(left):
            return
        for name in left:
            if self._tries and (len(left) == 1 or moves([name])):
                for moved in self._moved[name].values():
                    moved |= True
            self._tries = max(0, self._tries - 1)

    def _spoil(self, name: str, tensor: torch.Tensor) -> None:
        """Other numbers at all positions that stay: of the same sign and size, 0.1 in place of 0."""
        spoiled = spoiled_copy(tensor)
        with torch.no_grad():
            for axis, at in self._stays[name].items():
                gone = torch.as_tensor(~np.isin(np.arange(tensor.shape[axis]), at), device=tensor.device)
                spoiled = torch.where(_along(gone, axis, tensor.ndim), tensor, spoiled)
            tensor.copy_(spoiled)


def spoiled_copy(tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Other numbers: of the same sign and size, 0.1 in place of 0; whole numbers in reverse order."""
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.flip(tuple(range(tensor.ndim)))
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.device)
    return torch.where(tensor == 0, 0.1 * noise, tensor * (0.5 * noise).exp()).to(tensor.dtype)


def _along(mask: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    return mask.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _projected(outputs: list[torch.Tensor]) -> torch.Tensor:
    """One number: a random projection of all outputs, each of them relative to its largest entry.

    A plain sum would not see what a softmax or a norm at the end leaves constant.
    """
    total = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for output in outputs:
        if output.is_complex():
            output = torch.view_as_real(output.resolve_conj())
        if not output.is_floating_point():
            continue
        finite = output[torch.isfinite(output)]
        # Drawn for each output, so that two models get the same numbers for the same one.
        along = torch.randn(len(finite), generator=generator, dtype=torch.float64).to(finite.device)
        scale = float(finite.detach().abs().max()) if finite.numel() else 0.0
        if not finite.requires_grad or not scale:
            continue
        total = total.to(finite.device) + (finite * along).sum() / scale / math.sqrt(len(finite))
    return total


class _Followed(TorchFunctionMode):
    """Lets gradients pass where a forward pass stops them, and reach the statistics of a batch norm."""

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
    """`F.batch_norm`, differentiable in the statistics; torch's own refuses those that require gradients."""
    if training or mean is None or var is None:
        mean, var = (t.detach().clone() if t is not None else None for t in (mean, var))
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = (var + eps).rsqrt()
    y = (x - mean.reshape(shape)) * (scale if weight is None else scale * weight).reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


Found = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]
"""Tensors of a model by name, and the gradient of each; None where none reached it."""


def gradients(
    double: Double,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: AnyDraws,
    way: Way = PLAIN,
    *,
    also: Iterable[str] = (),
) -> Found:
    """A forward and a backward pass in float64.

    Args:
        double: The model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        draws: The random numbers of the forward pass.
        way: How the model runs.
        also: Tensors that are no parameters, by name.

    Returns:
        The parameters and the tensors in `also` by name, and the gradient of a random projection of the
        outputs for each; None where none reached it.
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
    asked = {name: t.requires_grad for name, t in tensors.items()}
    args, kwargs = doubled(args, kwargs)
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> None:
        # One at a time: of a model that lies in files, all gradients together may not fit into memory.
        if tensor.grad is not None:
            found[id(tensor)], tensor.grad = settled(tensor.grad, tensor), None

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
            tensor.requires_grad_(asked[name])
    return tensors, {name: found.get(id(tensor)) for name, tensor in tensors.items()}
