"""`repair_experts`: the surviving experts take over, in closed form and without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.copying import duplicate
from secateur.apply.record import record_of, with_repairs
from secateur.calibration import Calibration
from secateur.errors import SettingError
from secateur.experts.blocks import Block
from secateur.experts.down import Down, inputs_of
from secateur.experts.graph import ExpertGraph
from secateur.experts.routing import Call, Routed, watching
from secateur.models import device_of, evaluating

DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean of the Gram matrix's diagonal."""

METHOD = "experts"


def repair_experts(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    *,
    graph: ExpertGraph,
    memory: int = 2**31,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    r"""Refit the down-projections of the experts that stayed to the dense block's output.

    With x(t) what the dense block reads, y(t) what it gives and ŷ(t) what the pruned block gives for the same
    x(t), the changes D_e of all experts' down-projections together minimise

    .. math:: \sum_t \Big\lVert y(t) - \hat y(t) - \sum_{e} g_e(t) \, D_e \, a_e(t) \Big\rVert^2
              + \lambda \sum_e \lVert D_e \rVert^2

    g being the pruned router's weights and a what goes into a down-projection. Only sums of products are
    kept, in float64: per block the square of (experts kept × their inner size). The last fifth of each
    batch's tokens is held out to choose λ; a block whose held-out error no λ lowers stays as it is. All sums
    then give the result. Blocks are fitted from the dense model's activations, each on its own: later ones do
    not make up for errors of earlier ones.

    Args:
        small: What `apply_experts` returned; it is left as it was.
        model: The dense model.
        calibration: Data, without labels. What `Calibration.of` takes.
        graph: The trace of the dense model.
        memory: Most bytes for sums; if all blocks need more, the data are read several times.
        seed: For shuffling loaders.
        progress: Show a bar on a terminal.

    Returns:
        A repaired copy. `secateur.record_of` has the held-out errors before and after, as shares of the dense
        blocks' output: sum ||y - ŷ||² / sum ||y||². Of each block the sums of squares, and λ.

    Raises:
        SettingError: One block's sums alone need more than `memory`, or experts do not end in a linear layer.
        ArtifactError: `small` did not come from `apply_experts`.
    """
    record = record_of(small)
    kept = {group.name: group.kept for group in record.plan.groups if group.removed}
    repaired = duplicate(small)
    data = Calibration.of(calibration, seed=seed).to(device_of(model))
    blocks = [block for block in graph.blocks if block.name in kept]
    report: dict[str, Any] = {}
    for part in _parts(model, blocks, kept, memory):
        fits = {block.name: _Fit(repaired, replace(block, count=kept[block.name])) for block in part}

        def watch(call: Call, _: Callable[[], Routed], fits: dict[str, _Fit] = fits) -> None:
            fits[call.block.name].add(call)

        with evaluating(model), evaluating(repaired), torch.no_grad(), watching(model, part, watch):
            for batch in data.batches("Repairing experts", progress):
                model(*batch.args, **batch.kwargs)
        report |= {name: fit.solve() for name, fit in fits.items()}
    scale = sum(found["scale"] for found in report.values()) or 1.0
    entry = {
        "method": METHOD,
        "kept": any(found["damping"] is not None for found in report.values()),
        "measure": "distance to the dense blocks",
        "before": sum(found["before"] for found in report.values()) / scale,
        "after": sum(found["after"] for found in report.values()) / scale,
        "held_out_samples": max((found["tokens"] for found in report.values()), default=0),
        "blocks": report,
    }
    return with_repairs(repaired, [entry])


def _parts(model: nn.Module, blocks: list[Block], kept: dict[str, int], memory: int) -> Iterator[list[Block]]:
    """The blocks in order, as many at a time as the memory allows."""
    part: list[Block] = []
    used = 0
    for block in blocks:
        needed = 2 * 8 * (kept[block.name] * _inner(model, block)) ** 2
        if needed > memory:
            raise SettingError(
                f"repair_experts: expected sums that fit into {memory:,} bytes, got {needed:,} for "
                f"{block.name} "
                f"({kept[block.name]} experts of inner size {_inner(model, block)}). Give more memory, or "
                "leave "
                "this repair out."
            )
        if part and used + needed > memory:
            yield part
            part, used = [], 0
        part.append(block)
        used += needed
    if part:
        yield part


def _inner(model: nn.Module, block: Block) -> int:
    """The inner size of a down-projection: the smallest matrix of an expert, over its width."""
    experts = model.get_submodule(block.experts)
    if block.fused:
        shapes = [p.shape[1:] for p in experts.parameters(recurse=False) if p.ndim == 3]
    else:
        shapes = [p.shape for p in next(experts.children()).parameters() if p.ndim == 2]
    router = model.get_submodule(block.router)
    width = next(p.shape[1] for p in router.parameters(recurse=False) if p.ndim == 2)
    return min(s.numel() // width for s in shapes)


@dataclass
class _Sums:
    gram: Tensor
    cross: Tensor
    square: float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, y)
        self.square += float(y.square().sum())

    def error(self, change: Tensor) -> float:
        """Sum of squares left by this change."""
        return self.square + float((change * (self.gram @ change - 2 * self.cross)).sum())


class _Fit:
    """One block: sums while the data are read, then new down-projections."""

    def __init__(self, small: nn.Module, block: Block) -> None:
        self._small, self._block = small, block
        self._module = small.get_submodule(block.name)
        self._sums: tuple[_Sums, _Sums] | None = None
        self._down: Down | None = None
        self._scale, self._tokens = 0.0, 0

    def add(self, call: Call) -> None:
        """One call of the dense block."""
        seen: list[tuple[Routed, Tensor]] = []

        def watch(own: Call, routed: Callable[[], Routed]) -> None:
            seen.append((routed(), own.result(own.output)))

        with watching(self._small, [self._block], watch):
            self._module(*call.args, **call.kwargs)
        routed, ours = seen[0]
        self._down, inputs = inputs_of(self._small, self._block, routed)
        weight = torch.where(routed.valid, routed.weight, 0).double()
        columns = weight.new_zeros(len(weight), self._block.count, self._down.inner)
        index = torch.where(routed.valid, routed.index, 0)[..., None].expand_as(inputs)
        columns.scatter_add_(1, index, weight[..., None] * inputs.double())
        x, y = columns.flatten(1), call.result(call.output).double() - ours.double()
        if self._sums is None:
            size = (x.shape[1], x.shape[1]), (x.shape[1], y.shape[1])
            self._sums = (
                _Sums(x.new_zeros(size[0]), x.new_zeros(size[1])),
                _Sums(x.new_zeros(size[0]), x.new_zeros(size[1])),
            )
        cut = len(x) - len(x) // 5
        self._sums[0].add(x[:cut], y[:cut])
        self._sums[1].add(x[cut:], y[cut:])
        self._scale += float(call.result(call.output)[cut:].double().square().sum())
        self._tokens += len(x) - cut

    def solve(self) -> dict[str, Any]:
        """Writes the new weights; returns λ, None where none helped, and held-out sums of squares."""
        if self._sums is None or self._down is None:
            return {"damping": None, "before": 0.0, "after": 0.0, "scale": 0.0, "tokens": 0}
        fit, held = self._sums
        errors = {damping: held.error(_change(fit, damping)) for damping in DAMPINGS}
        best = min(errors, key=errors.__getitem__)
        found = {"before": held.square, "scale": self._scale, "tokens": self._tokens}
        if not errors[best] < held.square:
            return {"damping": None, "after": held.square, **found}
        whole = _Sums(fit.gram + held.gram, fit.cross + held.cross)
        change = _change(whole, best).reshape(self._block.count, self._down.inner, -1)
        for expert in range(self._block.count):
            matrix = self._down.matrix(expert).data
            matrix.copy_((matrix.double() + change[expert].T).to(matrix.dtype))
        return {"damping": best, "after": errors[best], **found}


def _change(sums: _Sums, damping: float) -> Tensor:
    """The ridge solution. [experts · inner, width]"""
    diagonal = sums.gram.diagonal()
    ridge = damping * float(diagonal.mean()) or 1.0
    damped = sums.gram + ridge * torch.eye(len(diagonal), dtype=sums.gram.dtype, device=sums.gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return torch.zeros_like(sums.cross)
    return torch.cholesky_solve(sums.cross, factor)
