"""Find out why a pruned model differs from its reference: the first module that differs, and the cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.common.caches import kept_tensors
from secateur.common.models import named_tensors
from secateur.common.outputs import tensors_of
from secateur.errors import ApplyError, ArtefactError
from secateur.plan import Plan
from secateur.targets.units.compare import (
    PLAIN,
    ROUNDED,
    Double,
    Way,
    double_copy,
    relative_difference,
    run,
    run_both,
    run_doubled,
    run_in_double,
)
from secateur.targets.units.draws import AnyDraws
from secateur.targets.units.record import record_of
from secateur.targets.units.tensors import cut, kept, removed_positions, tensor_called


@dataclass(frozen=True, eq=False)
class Pair:
    """The models that are compared.

    Attributes:
        model: The dense model.
        small: The pruned model.
        makes_reference: Makes the reference: the masked dense model, or the captured program.
        own_weights: Whether the weights are the user's own, without random numbers added.
    """

    model: nn.Module
    small: nn.Module
    makes_reference: Callable[[], nn.Module]
    own_weights: bool = True

    @cached_property
    def ours(self) -> Double:
        """The pruned model in float64."""
        return Double(self.small)

    @property
    def reference(self) -> nn.Module:
        """A new copy of the reference that the pruned model has to equal."""
        return self.makes_reference()

    @cached_property
    def theirs(self) -> Double:
        """The reference in float64."""
        return Double(self.reference, own=True)


@dataclass(frozen=True, eq=False)
class Compared:
    """Two models that gave different outputs.

    Attributes:
        pair: The models.
        plan: The plan that was applied.
        args: Positional arguments.
        kwargs: Keyword arguments.
        draws: The random numbers of both models.
        difference: The largest relative difference of an output.
        way: How both models ran.
    """

    pair: Pair
    plan: Plan
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    draws: AnyDraws
    difference: float
    way: Way = PLAIN

    def dense_moves(self, by: float = 0.0) -> float:
        """Relative difference of two runs of the reference, with perturbed weights in one of them."""
        first, second = double_copy(self.pair.reference), perturbed_weights(self.pair.reference, by)
        outputs = [run_doubled(m, self.args, self.kwargs, self.draws, self.way) for m in (first, second)]
        return relative_difference(*outputs)

    def rounding(self) -> bool:
        """Whether a change in the last digits of the dense weights changes the dense output as much."""
        return 10 * self.dense_moves(1e-15) >= self.difference


def perturbed_weights(model: nn.Module, by: float, seed: int = 0) -> nn.Module:
    """Return a copy in float64 whose weights are changed by random numbers of this relative size."""
    double = double_copy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in double.parameters() if by else ():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + by * noise.to(parameter.device))
    return double


def cause(found: Compared) -> str:
    """Say what explains a difference and what to do. A bug is the last possibility."""
    try:
        record = record_of(found.pair.small)
    except ArtefactError:  # the model is inside a class of the user's own
        record = None
    if record is not None and any(r.get("kept") for r in record.repairs):
        return "It was repaired after apply, which changes its output on purpose. Verify before repair."
    if changed := changed_tensor(found.pair, found.plan):
        return (
            f"Its tensor {changed} is not the dense model's tensor without the removed positions: one of the "
            f"two models was trained, repaired, converted or changed after apply. Verify before that."
        )
    if found.draws.unlike:
        return (
            f"Both models draw random numbers in their forward pass, but not the same ones "
            f"({found.draws.unlike}), so they cannot be compared. Turn off what is random to prove the rest."
        )
    if (again := found.dense_moves()) > 0.1 * found.difference:
        return (
            f"The dense model itself differs by {again:.2g} between two runs on the same inputs, so nothing "
            f"can be proven. Make its forward pass repeatable."
        )
    if not found.way.training and _asks_for_gradients(found):
        return (
            "The dense model computes something else when gradients are on: its code asks "
            "torch.is_grad_enabled() or requires_grad. The trace ran with gradients on, this comparison "
            "without. Let the code ask self.training, or an argument, and trace again."
        )
    if found.rounding():
        return (
            "The dense model amplifies rounding that much: changing its weights in the 15th digit changes "
            "its output as much. Pass a larger tolerance=."
        )
    if found.way.training:  # evaluation mode agrees
        return (
            "In training mode its code uses a number that depends on the number of units, such as a rate, in "
            "a way that no attribute and no call shows. Set that number in another way, or leave out the "
            "group with limits=sc.Limits(ignore=...)."
        )
    if differs := _other_attribute(found.pair.model, found.pair.small):
        return f"Its {differs}. The trace saw only one value: set it before trace."
    if kept := _other_state(found.pair.model, found.pair.small):
        return (
            f"Its {kept} differs from that of the dense model: earlier calls may have set it. Verify before "
            f"the pruned model is called, or reset both."
        )
    if record is not None and record.form == "graph" and _only_in_double(found):
        return (
            "In the model's own dtype both models agree. The captured program has limits of that dtype, such "
            "as torch.finfo(x.dtype).min, as constants, so comparing in float64 is no proof here. Use form "
            "'module', or inputs in which no sample and no position is padding only."
        )
    return "Please report this as a bug."


def _other_attribute(model: nn.Module, small: nn.Module) -> str:
    """Return the first plain attribute (bool, str) that differs, with both values; empty if there is none."""
    ours = dict(small.named_modules())
    for path, module in model.named_modules():
        held = vars(ours[path]) if path in ours else {}
        for name, value in vars(module).items():
            now = held.get(name, value)
            switch = not name.startswith("_") and name != "training" and isinstance(value, bool | str | None)
            if switch and isinstance(now, bool | str | None) and now != value:
                return f"{f'{path}.{name}'.lstrip('.')} is {now!r}, and that of the model {value!r}"
    return ""


def _other_state(model: nn.Module, small: nn.Module) -> str:
    """Return the first tensor outside the state dict that only one model has, or that differs; else empty."""
    ours, theirs = kept_tensors(small), kept_tensors(model)
    for slot in {**theirs, **ours}:
        mine, other = (tensors_of(held.get(slot)) for held in (ours, theirs))
        shapes = [t.shape for t in mine] == [t.shape for t in other]
        if len(mine) != len(other) or (shapes and not all(map(torch.equal, mine, other))):
            return ".".join(map(str, filter(None, (slot.path, *slot.keys))))
    return ""


def _only_in_double(found: Compared) -> bool:
    """Whether the models differ only in float64, and agree in their own dtype."""
    if found.way != PLAIN:
        return False
    ours, theirs = partial(run, found.pair.small), partial(run, found.pair.reference)
    return relative_difference(*run_both(ours, theirs, found.args, found.kwargs, found.draws)) <= ROUNDED


def _asks_for_gradients(found: Compared) -> bool:
    """Whether the dense model's outputs depend on whether gradients are on."""
    without = run_in_double(found.pair.model, found.args, found.kwargs, found.draws, found.way)
    way = found.way._replace(gradients=True)
    try:
        outputs = run_in_double(found.pair.model, found.args, found.kwargs, found.draws, way)
    except Exception:  # it may fail in any way, with gradients
        return True
    return 10 * relative_difference(outputs, without) >= found.difference


def changed_tensor(pair: Pair, plan: Plan) -> str:
    """Return the first tensor that is not the dense tensor without the removed positions; empty if none."""
    removed = removed_positions(plan)
    for name, dense in named_tensors(pair.model).items():
        try:
            now = tensor_called(pair.small, name)
        except ApplyError:
            continue
        expected = cut(dense, removed.get(name, {}))
        if expected.shape == now.shape and not torch.equal(expected, now.detach().to(expected.dtype)):
            return name
        if expected.dtype != now.dtype:
            return name
    return ""


def first_module(found: Compared) -> str:
    """Return the path of the first module whose output differs from that in the reference; empty if unknown.

    If an axis is shorter in the pruned model, the kept positions are not known. So those of each tensor with
    an axis of the same size are tried. The module differs if the outputs are equal for none of them.
    """
    ours, theirs = double_copy(found.pair.small), double_copy(found.pair.reference)
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    try:
        for path, number, outputs in _outputs(ours, found):
            seen[path, number] = outputs
        choices = _choices(found.pair.model, found.plan)
        for path, number, outputs in _outputs(theirs, found):
            before = seen.get((path, number))
            if before is not None and not _alike(before, outputs, choices):
                return path
    except Exception:  # a forward pass that fails has no further modules to name
        return ""
    return ""


def _outputs(model: nn.Module, found: Compared) -> list[tuple[str, int, list[torch.Tensor]]]:
    """Return path, number of the call, and tensors of each call of each module, in order of return."""
    calls: list[tuple[str, int, list[torch.Tensor]]] = []
    counts: dict[str, int] = {}

    def hook(path: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            counts[path] = counts.get(path, 0) + 1
            calls.append((path, counts[path], [t.detach().clone() for t in tensors_of(output)]))

        return note

    for path, module in model.named_modules():
        if path:
            module.register_forward_hook(hook(path))
    run_doubled(model, found.args, found.kwargs, found.draws, found.way)
    return calls


def _choices(model: nn.Module, plan: Plan) -> dict[tuple[int, int], list[NDArray[np.int64]]]:
    """Map (size before, size after) of an axis to the kept positions of tensors with such an axis."""
    found: dict[tuple[int, int], list[NDArray[np.int64]]] = {}
    for name, axes in removed_positions(plan).items():
        try:
            shape = tensor_called(model, name).shape
        except ApplyError:
            continue
        for axis, gone in axes.items():
            stays = np.flatnonzero(kept(shape[axis], gone))
            known = found.setdefault((shape[axis], len(stays)), [])
            if not any(np.array_equal(stays, other) for other in known):
                known.append(stays)
    return found


def _alike(
    ours: list[torch.Tensor],
    theirs: list[torch.Tensor],
    choices: Mapping[tuple[int, int], list[NDArray[np.int64]]],
) -> bool:
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a.ndim != b.ndim:
            continue
        other = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]
        options = [b]
        if other:
            options = [
                b.index_select(other[0], torch.as_tensor(stays, device=b.device))
                for stays in choices.get((b.shape[other[0]], a.shape[other[0]]), [])
            ]
        if len(other) > 1 or not options:
            continue  # no tensor says which positions these are
        if not any(relative_difference([a], [option]) <= 1e-9 for option in options):
            return False
    return True
