"""Where the neurons of an expert lie in its tensors, found by gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.calibration.randomness import seeded
from secateur.errors import SettingError
from secateur.measure.kernels import with_loop
from secateur.targets.experts.blocks import Block
from secateur.targets.experts.down import Down
from secateur.targets.experts.graph import expert_parameters
from secateur.targets.units.copying import duplicate

_TOKENS = 256


@dataclass(frozen=True)
class Neurons:
    """The neurons of a block's experts: what goes into their down-projections.

    Attributes:
        axes: For each tensor of an expert the axis along which its neurons lie, and which neuron each
            position belongs to [positions]; None where the tensor has no such axis, as a bias of the output.
        inner: Number of neurons.
    """

    axes: dict[str, tuple[int, Tensor] | None]
    inner: int

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of one expert, by neuron. [inner, numbers of one neuron]"""
        axis, order = self._order(name)
        return tensor.movedim(axis, 0)[order].reshape(self.inner, -1)

    def write(self, name: str, tensor: Tensor, rows: Tensor) -> None:
        """Put what `rows` gives back into the tensor, in place."""
        axis, order = self._order(name)
        view = tensor.movedim(axis, 0)
        view[order] = rows.reshape(view.shape).to(tensor.dtype)

    def _order(self, name: str) -> tuple[int, Tensor]:
        axis, neuron = self.axes[name] or (0, torch.empty(0, dtype=torch.int64))
        return axis, neuron.argsort(stable=True)


def tensors_of(model: nn.Module, block: Block, expert: int) -> dict[str, Tensor]:
    """The parameters of one expert, by their names within it; views where the experts are fused."""
    found = {}
    for name, parameter, number in expert_parameters(model, block):
        if number is None:
            found[name] = parameter[expert]
        elif number == expert:
            found[name.partition(".")[2]] = parameter
    return found


def output_of(model: nn.Module, block: Block, expert: int, tokens: Tensor) -> Tensor:
    """What one expert gives for these tokens, without the router's weight. [tokens, width]"""
    experts = model.get_submodule(block.experts)
    if block.fused:
        index = torch.full((len(tokens), 1), expert, device=tokens.device)
        found: Tensor = experts(tokens, index, tokens.new_ones(len(tokens), 1))
    else:
        found = list(experts.children())[expert](tokens)
    return found


def neurons_of(model: nn.Module, block: Block, down: Down, expert: int) -> Neurons:
    """Where the neurons of this expert lie.

    On a float64 copy, some columns of the down-projection are set to zero: no gradient of the output reaches
    the weights of those neurons. The neurons that stay are those whose number has a certain bit, and then
    those whose number has it not, so that the gradients spell the number of each position's neuron.

    Raises:
        SettingError: The positions of a matrix do not belong to one neuron each: the expert has more layers.
    """
    last = next(
        name.partition(".")[2] if number is not None else name
        for name, p, number in expert_parameters(model, block)
        if any(p is w for w in down.weights) and number in (None, expert)
    )
    device = next(model.parameters()).device
    trial = nn.ModuleDict({"experts": duplicate(model.get_submodule(block.experts))})
    trial = with_loop(trial.double()).requires_grad_(True)
    inside = Block("", "experts", "", block.count, block.fused, _fused_names(block), (), None)
    own = tensors_of(trial, inside, expert)
    matrix = own[last].data if down.out_axis == 0 else own[last].data.T
    width, inner = matrix.shape
    with seeded(0):
        tokens = torch.randn(_TOKENS, width, dtype=torch.float64, device=device)
    tokens = tokens * torch.logspace(-1, 1, _TOKENS, dtype=torch.float64, device=device)[:, None]
    dense, numbers = matrix.clone(), torch.arange(inner, device=device)
    reached: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for bit in range(max(1, (inner - 1).bit_length())):
        shown: list[dict[str, Tensor]] = []
        for wanted in (0, 1):
            matrix.copy_(dense * ((numbers >> bit) & 1 == wanted))
            with torch.enable_grad():
                trial.zero_grad(set_to_none=False)
                output_of(trial, inside, expert, tokens).square().sum().backward()
            shown.append(_gradients(trial, inside, expert, own))
        for name, tensor in own.items():
            if name != last:
                for axis in range(tensor.ndim):
                    pair = tuple(_any_along(found[name], axis) for found in shown)
                    reached.setdefault((name, axis), []).append((pair[0], pair[1]))
    axes: dict[str, tuple[int, Tensor] | None] = {last: (1 - down.out_axis, numbers)}
    for name, tensor in own.items():
        if name == last:
            continue
        found = [
            (axis, neuron)
            for axis in range(tensor.ndim)
            if (neuron := _numbers(reached[name, axis], inner)) is not None
        ]
        if not found and tensor.ndim > 1:
            raise SettingError(
                f"experts {block.experts}: expected experts with one layer of {inner} neurons, each of "
                f"which moves the output, got {name} {list(tensor.shape)} whose rows and columns belong to "
                "several or to none. Leave the repair 'merge' out."
            )
        axes[name] = found[0] if found else None
    return Neurons(axes, inner)


def _fused_names(block: Block) -> tuple[str, ...]:
    return tuple(n.replace(block.experts, "experts", 1) for n in block.tensors if n.startswith(block.experts))


def _gradients(trial: nn.Module, block: Block, expert: int, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of one expert's parameters; zeros where none came."""
    found = {}
    for name, parameter, number in expert_parameters(trial, block):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if number is None:
            found[name] = gradient[expert].clone()
        elif number == expert:
            found[name.partition(".")[2]] = gradient.clone()
    return {name: found[name] for name in own}


def _any_along(gradient: Tensor, axis: int) -> Tensor:
    return (gradient.movedim(axis, 0).reshape(gradient.shape[axis], -1) != 0).any(1)


def _numbers(reached: list[tuple[Tensor, Tensor]], inner: int) -> Tensor | None:
    """Which neuron each position belongs to; None where the axis is not one of neurons."""
    number = torch.zeros_like(reached[0][0], dtype=torch.int64)
    for bit, (without, with_bit) in enumerate(reached):
        if not bool((without ^ with_bit).all()):
            return None
        number += with_bit.long() << bit
    counts = torch.bincount(number, minlength=inner)
    return number if len(counts) == inner and bool((counts == counts[0]).all()) else None
