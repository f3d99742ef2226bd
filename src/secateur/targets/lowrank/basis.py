"""The principal directions of a layer's outputs, measured on data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration, seeded
from secateur.calibration.padding import running_padding
from secateur.common.models import device_of, evaluating
from secateur.errors import CalibrationError
from secateur.repairs.regression.leastsquares import add_products
from secateur.signals.distributed import team_of_processes
from secateur.targets.lowrank.pair import matrix_of, sizes, tensors_of

DAMPING = 1e-4
"""Variance that is added to that of each input, as a share of their mean variance, weighted by the weight. It
orders the directions in which the data have no variance."""

MEMORY = 2**31
"""Most bytes of second moments at one time. If all layers need more, the data are read several times."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The directions of one layer.

    Attributes:
        directions: Orthonormal columns, that of the largest outputs first. float64 [out, min(in, out)]
        energy: The mean square of the outputs along each direction, without the bias; if there is a `mean`,
            of their difference from it. [min(in, out)]
        mean: The mean of the outputs without the bias, [out]; None if the layer has no bias.
    """

    directions: Tensor
    energy: Tensor
    mean: Tensor | None


def bases(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Calibration, *, progress: bool = False
) -> dict[str, Basis]:
    """The directions of layers, measured on data.

    Args:
        model: The model, which is run in evaluation mode.
        layers: Its layers, by path.
        data: The calibration data. Padding does not count.
        progress: Show a progress bar on a terminal.

    Returns:
        For each layer that the data reach, its basis.

    Raises:
        CalibrationError: There is no data, or what a layer reads is not finite.
    """
    found: dict[str, Basis] = {}
    for some in _parts(layers):
        sums = {path: _Sums(layer) for path, layer in some.items()}
        _accumulate(model, sums, data, progress)
        for path, layer in some.items():
            if not all(bool(torch.isfinite(t).all()) for t in sums[path].state.values()):
                raise CalibrationError(
                    f"factorise: expected finite inputs of {path}, got NaN or infinity. Check the weights "
                    "and the data."
                )
            if float(sums[path].state["count"]) > 0:
                found[path] = sums[path].basis(matrix_of(layer).double())
    return found


def basis_of_weight(layer: nn.Module) -> Basis:
    """The directions of a layer whose inputs all have mean 0 and variance 1 and are independent."""
    weight = matrix_of(layer).double()
    out, into = weight.shape
    mean = None if layer.bias is None else weight.new_zeros(out)
    if weight.is_meta:  # it has sizes only
        return Basis(weight.new_empty(out, min(out, into)), weight.new_empty(min(out, into)), mean)
    second = weight @ weight.T if out <= into else torch.eye(into).to(weight)
    return _solved(weight, second, mean)


def _parts(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Split layers into parts whose second moments need at most `MEMORY` bytes."""
    some: dict[str, nn.Module] = {}
    used = 0
    for path, layer in layers.items():
        size = 8 * min(sizes(layer)) ** 2
        if some and used + size > MEMORY:
            yield some
            some, used = {}, 0
        some[path] = layer
        used += size
    if some:
        yield some


class _Sums:
    """Second moments of a layer: of its outputs without the bias, or of its inputs where they are fewer."""

    def __init__(self, layer: nn.Module) -> None:
        self._bias = tensors_of(layer)[1]
        out, into = sizes(layer)
        self._of_outputs = out <= into
        options: dict[str, Any] = {"dtype": torch.float64, "device": matrix_of(layer).device}
        size = min(out, into)
        self.state: dict[str, Tensor] = {
            "count": torch.zeros((), **options),
            "x": torch.zeros(size, **options),
            "xx": torch.zeros(size, size, **options),
        }

    def see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """Add one call of the layer to the sums. This is a forward hook."""
        value = output if self._of_outputs else next(iter((*args, *kwargs.values())))
        if isinstance(layer, nn.Conv2d):
            steps: Any = layer.stride
            value = value if self._of_outputs else value[..., :: steps[0], :: steps[1]]
            value = value.movedim(-3, -1)
        rows = running_padding().matrix(value.detach())
        rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        if self._of_outputs and self._bias is not None:
            rows = rows - self._bias.detach()
        self.state["count"] += len(rows)
        self.state["x"] += rows.sum(0, dtype=torch.float64)
        add_products(self.state["xx"][None], rows[None])

    def basis(self, weight: Tensor) -> Basis:
        """The directions. `weight` [out, in] float64"""
        count = self.state["count"]
        second, mean = self.state["xx"] / count, None
        if self._bias is not None:
            centre = self.state["x"] / count
            second = second - centre[:, None] * centre
            mean = centre if self._of_outputs else weight @ centre
        return _solved(weight, second, mean)


def _solved(weight: Tensor, second: Tensor, mean: Tensor | None) -> Basis:
    """The principal axes of the outputs.

    Args:
        weight: [out, in]
        second: Second moments of the outputs [out, out] if out <= in, else of the inputs [in, in].
        mean: See `Basis`.
    """
    out, into = weight.shape
    if out <= into:
        products = weight @ weight.T
        damping = DAMPING * float(second.trace()) / (float(products.trace()) or 1.0)
        directions = torch.linalg.eigh(second + damping * products).eigenvectors.flip(1)
        return Basis(directions, ((second @ directions) * directions).sum(0).clamp_min(0), mean)
    products = weight.T @ weight
    damping = DAMPING * float((second * products).sum()) / (float(products.trace()) or 1.0)
    values, vectors = torch.linalg.eigh(second)
    root = vectors * (values.clamp_min(0) + damping).sqrt()
    right = torch.linalg.eigh(root.T @ products @ root).eigenvectors.flip(1)
    directions = torch.linalg.qr(weight @ root @ right).Q
    along = weight.T @ directions
    return Basis(directions, ((second @ along) * along).sum(0).clamp_min(0), mean)


def _accumulate(model: nn.Module, sums: Mapping[str, _Sums], data: Calibration, progress: bool) -> None:
    """Run the model on all data, and add to the sums. Processes share the batches and get the same sums."""
    device = device_of(model)
    with team_of_processes(device) as team:
        with team.together(), seeded(0), torch.no_grad(), evaluating(model):
            handles = [
                model.get_submodule(path).register_forward_hook(s.see, with_kwargs=True)
                for path, s in sums.items()
            ]
            try:
                batches = data.to(device).batches("Measuring directions", progress, team.takes)
                for batch in batches:
                    batch.run(model)
            finally:
                for handle in handles:
                    handle.remove()
        if team.size > 1:
            for each in sums.values():
                each.state = {name: team.mean(tensor) * team.size for name, tensor in each.state.items()}
