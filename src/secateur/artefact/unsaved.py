"""Tensors outside of the state dict, which no artefact holds: check that a loaded model has the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.caches import Slot, kept_tensors, rebuilt_tensors, value_of
from secateur.common.models import evaluating
from secateur.common.outputs import agree, tensors_of
from secateur.graph.inputs import Arguments

SAMPLE = 16
"""A record holds this many numbers of each such tensor."""
_LARGE = 1e30


class Sample(BaseModel):
    """A sample of a tensor that its artefact does not hold, for the record.

    Attributes:
        shape: The tensor's shape.
        numbers: Some of its entries, at equal distances.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: tuple[int, ...]
    numbers: tuple[float, ...]

    def is_like(self, other: Sample) -> bool:
        """Whether the numbers are equal up to rounding to half precision."""
        largest = max(map(abs, self.numbers), default=0.0)
        pairs = zip(self.numbers, other.numbers, strict=True)
        return self.shape != other.shape or all(abs(a - b) <= 1e-2 * largest for a, b in pairs)


def unsaved(model: nn.Module) -> dict[str, Sample]:
    """Return samples of all tensors of a model that its state dict does not hold, by name.

    These are attributes, entries of lists, dictionaries and objects, buffers that are not saved, and
    constants of captured programs.
    """
    return {name: _sample(tensor) for name, tensor in _tensors(model).items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for slot in _places(model) for name, tensor in _in_slot(model, slot)}


def _places(model: nn.Module) -> Iterator[Slot]:
    """Yield the places of such tensors."""
    yield from kept_tensors(model)
    for path, module in model.named_modules():
        yield from (Slot(path, ("_buffers", name)) for name in module._non_persistent_buffers_set)
        if isinstance(module, fx.GraphModule):
            yield from (Slot(path, (name,)) for name, v in vars(module).items() if type(v) is Tensor)


def _in_slot(model: nn.Module, slot: Slot) -> Iterator[tuple[str, Tensor]]:
    path = ".".join(filter(None, (slot.path, *(str(key) for key in slot.keys if key != "_buffers"))))
    for number, leaf in enumerate(pytree.tree_leaves(value_of(model, slot))):
        if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.layout is torch.strided:
            yield f"{path}.{number}" if number else path, leaf


def _sample(tensor: Tensor) -> Sample:
    flat = tensor.detach().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    chosen = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].double().nan_to_num(0.0, _LARGE, -_LARGE)
    return Sample(shape=tuple(tensor.shape), numbers=tuple(chosen.clamp(-_LARGE, _LARGE).tolist()))


def other_numbers(model: nn.Module, wanted: Mapping[str, Sample], arguments: Arguments | None) -> str:
    """Return the first tensor with other numbers that changes the model's outputs; empty if there is none.

    Tensors that a forward pass makes again or changes do not count. If the model does not run on the
    arguments, all others count.

    Args:
        model: The loaded model. It is not changed.
        wanted: The samples in its artefact.
        arguments: Arguments of a call; None if none are known.
    """
    now = unsaved(model)
    differ = [name for name in wanted if name in now and not wanted[name].is_like(now[name])]
    if not differ or arguments is None:
        return next(iter(differ), "")
    args, kwargs = arguments
    again = rebuilt_tensors(model, kept_tensors(model), args, kwargs)
    made = {name for slot in again for name, _ in _in_slot(model, slot)}

    def run(perturbed: str = "") -> tuple[list[Tensor], dict[str, Sample]]:
        with evaluating(model), torch.no_grad(), seeded(0):
            tensor = _tensors(model).get(perturbed)
            if tensor is not None:
                tensor.copy_(tensor * 1.5 + 0.1 if tensor.is_floating_point() else tensor.flip(0))
            return tensors_of(model(*args, **kwargs)), unsaved(model)

    try:
        usual, after = run()
    except Exception:  # it does not run on these arguments, so it is not known what it reads
        return differ[0]
    for name in differ:
        if name in made or name not in after or not after[name].is_like(now[name]):
            continue
        with suppress(Exception):  # such as an index that is out of range now
            if agree(run(name)[0], usual):
                continue
        return name
    return ""
