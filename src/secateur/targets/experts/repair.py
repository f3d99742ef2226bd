"""Experts in `sc.repair`: the surviving experts take over, in closed form and without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.calibration import Calibration, Forward
from secateur.calibration.padding import running_padding
from secateur.common.models import device_of, evaluating
from secateur.errors import SettingError
from secateur.repairs.methods import Methods
from secateur.repairs.regression.leastsquares import add_products, damped_solution
from secateur.targets.experts.blocks import Block
from secateur.targets.experts.down import Down, inputs_of
from secateur.targets.experts.graph import ExpertGraph
from secateur.targets.experts.merge import SHARES, Heirs, heirs, merge
from secateur.targets.experts.routing import Call, Routed, watching
from secateur.targets.experts.trace import trace
from secateur.targets.units.copying import duplicate
from secateur.targets.units.record import record_of, with_repairs

DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean of the Gram matrix's diagonal."""

METHOD, MERGE = "experts", "merge"
REPAIRS = (MERGE, METHOD)
"""What experts can be repaired by, in the order in which they run."""

MEMORY = 2**31
"""Most bytes that the sums may take where nothing else was asked for."""


def check_methods(where: str, methods: Any) -> tuple[str, ...]:
    """The repairs that were asked for, in their order; refuse those that experts do not have."""
    if methods is None:
        return ()
    asked = tuple(methods) if isinstance(methods, Iterable) and not isinstance(methods, str) else (methods,)
    if asked == ("auto",):
        return (METHOD,)
    if asked not in ((METHOD,), (MERGE,), REPAIRS):
        raise SettingError(
            f"{where}={methods!r}): expected None, 'auto', {METHOD!r}, {MERGE!r} or {[*REPAIRS]!r}. Name one."
        )
    return asked


def repair(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: Methods = "auto",
    *,
    graph: ExpertGraph | None = None,
    memory: int | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    r"""Refit the down-projections of the experts that stayed to the dense block's output.

    With x(t) what the dense block reads, y(t) what it gives and ŷ(t) what the pruned block gives for the same
    x(t), the changes D_e of all experts' down-projections together minimise

    .. math:: \sum_t \Big\lVert y(t) - \hat y(t) - \sum_{e} g_e(t) \, D_e \, a_e(t) \Big\rVert^2
              + \lambda \sum_e \lVert D_e \rVert^2

    g being the pruned router's weights and a what goes into a down-projection. Only sums of products are
    kept, in float64: per block the square of (experts kept × their inner size). Where that does not fit
    into `memory`, as many experts as fit are refitted at a time, those after them to what these leave.
    The last fifth of each batch's tokens, without padding, is held out to choose λ; experts whose
    held-out error no λ lowers stay as they are. All sums then give the result. Blocks are fitted from the
    dense model's activations, each on its own: later ones do not make up for errors of earlier ones.

    ``merge`` averages removed experts into those that stayed (`secateur.targets.experts.merge`) with several
    shares, and every block keeps the share that leaves it nearest to the dense one on the held-out tokens,
    after the refit if there is one. The data are read five times.

    By default `memory` suffices for eight experts of inner size 1,408 together, ``2**35`` for 32.

    Returns:
        A repaired copy. `secateur.record_of` has the held-out errors before and after, as shares of the dense
        blocks' output: sum ||y - ŷ||² / sum ||y||². Of each block the sums of squares, and λ of each part.

    Raises:
        SettingError: One expert's sums alone need more than `memory`, or experts do not end in a linear
            layer, or a method is unknown.
        ArtefactError: `small` did not come from `apply`.
    """
    steps = check_methods("repair(methods", methods)
    record = record_of(small)
    lost = {group.name: group for group in record.plan.groups if group.removed}
    repaired = duplicate(small)
    if not steps:
        return repaired
    data = Calibration.of(calibration, seed=seed, forward=forward, model=model).to(device_of(model))
    graph = trace(model, data.first().inputs) if graph is None else graph
    blocks = [block for block in graph.blocks if block.name in lost]
    kept = {name: [e for e in range(g.size) if e not in set(g.removed)] for name, g in lost.items()}
    refit = METHOD in steps

    def fitted(copy: nn.Module) -> dict[str, Any]:
        return _fitted(copy, model, blocks, kept, data, memory or MEMORY, refit=refit, progress=progress)

    report = fitted(repaired)
    entries = []
    if MERGE in steps:
        found = _merged(repaired, small, model, heirs(model, blocks, kept, data), report, fitted)
        entries.append(_entry(MERGE, found, any(block["share"] for block in found.values())))
    if refit:
        entries.append(_entry(METHOD, report, any(set(f["dampings"]) != {None} for f in report.values())))
    return with_repairs(repaired, entries)


def _fitted(
    small: nn.Module,
    model: nn.Module,
    blocks: list[Block],
    kept: Mapping[str, Sequence[int]],
    data: Calibration,
    memory: int,
    *,
    refit: bool,
    progress: bool,
) -> dict[str, Any]:
    """Refit in place, or only measure; by block the held-out sums of squares before and after."""
    report: dict[str, Any] = {}
    counts = {name: len(numbers) for name, numbers in kept.items()}
    by_name = {block.name: block for block in blocks}
    for parts in passes(model, blocks, counts, memory):
        fits = {part.block.name: _Fit(small, part, refit=refit) for part in parts}

        def watch(call: Call, _: Callable[[], Routed], fits: dict[str, _Fit] = fits) -> None:
            fits[call.block.name].add(call)

        dense = [by_name[name] for name in fits]
        with evaluating(model), evaluating(small), torch.no_grad(), watching(model, dense, watch):
            for batch in data.batches("Repairing experts", progress):
                batch.run(model)
        for name, fit in fits.items():
            found = fit.solve()
            damping = found.pop("damping")
            known = report.setdefault(name, {**found, "dampings": []})
            known["after"] = found["after"]
            known["dampings"].append(damping)
    return report


def _merged(
    repaired: nn.Module,
    small: nn.Module,
    model: nn.Module,
    found: Sequence[Heirs],
    report: dict[str, Any],
    fitted: Callable[[nn.Module], dict[str, Any]],
) -> dict[str, Any]:
    """Merge with each of `SHARES`, and let every block keep what leaves it nearest to the dense one.

    Args:
        repaired: The model with the experts dropped, and refitted if that was asked for; it is changed.
        small: The same without a refit.
        model: The dense model.
        found: Who takes over from whom.
        report: Of `repaired`; each block's becomes that of what it keeps.
        fitted: Refits a model, or only measures it.

    Returns:
        By block the share that it keeps, the heirs, and the held-out errors of dropping and of this.
    """
    chosen = {
        block.block.name: {**report[block.block.name], "share": 0.0, "heirs": dict(block.heir)}
        for block in found
    }
    for entry in chosen.values():
        entry["before"] = entry["after"]
    for share in SHARES:
        trial = duplicate(small)
        for block in found:
            merge(trial, model, block, share)
        for name, tried in fitted(trial).items():
            if tried["after"] < chosen[name]["after"]:
                experts = next(b.block.experts for b in found if b.block.name == name)
                repaired.get_submodule(experts).load_state_dict(trial.get_submodule(experts).state_dict())
                chosen[name] |= {"share": share, "after": tried["after"]}
                report[name] = tried
    return chosen


def _entry(method: str, report: dict[str, Any], kept: bool) -> dict[str, Any]:
    """What the record says of one repair."""
    scale = sum(found["scale"] for found in report.values()) or 1.0
    return {
        "method": method,
        "kept": kept,
        "measure": "distance to the dense blocks",
        "before": sum(found["before"] for found in report.values()) / scale,
        "after": sum(found["after"] for found in report.values()) / scale,
        "held_out_samples": max((found["tokens"] for found in report.values()), default=0),
        "blocks": report,
    }


@dataclass(frozen=True)
class Part:
    """Experts of a block whose down-projections are refitted together.

    Attributes:
        block: The pruned block.
        experts: Their numbers among those that stayed.
    """

    block: Block
    experts: range


def passes(model: nn.Module, blocks: list[Block], kept: dict[str, int], memory: int) -> list[list[Part]]:
    """What each pass over the data refits: as many blocks as the memory allows.

    Of each block all experts, or where their sums do not fit, one part after another.

    Raises:
        SettingError: The sums of one expert do not fit.
    """
    turns: list[list[tuple[Part, int]]] = []
    for block in blocks:
        inner, count = _inner(model, block), kept[block.name]
        most = math.isqrt(memory // 16) // inner
        if not most:
            raise SettingError(
                f"repair: expected sums that fit into {memory:,} bytes, got {16 * inner**2:,} for an "
                f"expert of {block.name} (inner size {inner}). Give more memory, or leave this repair out."
            )
        pruned = replace(block, count=count)
        for turn, experts in enumerate(np.array_split(np.arange(count), -(-count // most))):
            if turn == len(turns):
                turns.append([])
            part = Part(pruned, range(int(experts[0]), int(experts[-1]) + 1))
            turns[turn].append((part, 16 * (len(experts) * inner) ** 2))
    found: list[list[Part]] = []
    for turn_parts in turns:
        used = memory + 1
        for part, needed in turn_parts:
            if used + needed > memory:
                found.append([])
                used = 0
            found[-1].append(part)
            used += needed
    return found


def _inner(model: nn.Module, block: Block) -> int:
    """The inner size of the widest down-projection: the smallest matrix of an expert, over its width."""
    experts = model.get_submodule(block.experts)
    if block.fused:
        shapes = [[p.shape[1:] for p in experts.parameters(recurse=False) if p.ndim == 3]]
    else:
        shapes = [[p.shape for p in e.parameters() if p.ndim == 2] for e in experts.children()]
    router = model.get_submodule(block.router)
    width = next(p.shape[1] for p in router.parameters(recurse=False) if p.ndim == 2)
    return max(min(s.numel() // width for s in matrices) for matrices in shapes)


@dataclass
class _Sums:
    gram: Tensor
    cross: Tensor
    square: float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        add_products(self.gram[None], x[None])
        self.cross.addmm_(x.T, y)
        self.square += float(y.square().sum())

    def error(self, change: Tensor) -> float:
        """Sum of squares left by this change."""
        return self.square + float((change * (self.gram @ change - 2 * self.cross)).sum())


class _Fit:
    """One block, or a part of it: sums while the data are read, then new down-projections."""

    def __init__(self, small: nn.Module, part: Part, *, refit: bool) -> None:
        self._small, self._block, self._experts, self._refit = small, part.block, part.experts, refit
        self._module = small.get_submodule(part.block.name)
        self._sums: tuple[_Sums, _Sums] | None = None
        self._down: Down | None = None
        self._scale, self._tokens = 0.0, 0

    def add(self, call: Call) -> None:
        """Add one call of the dense block, without its padding."""
        seen: list[tuple[Routed, Tensor]] = []

        def watch(own: Call, routed: Callable[[], Routed]) -> None:
            seen.append((routed(), own.result(own.output)))

        with watching(self._small, [self._block], watch):
            self._module(*call.args, **call.kwargs)
        routed, outputs = seen[0]
        self._down, inputs = inputs_of(self._small, self._block, routed)
        number = routed.index - self._experts.start
        own = routed.valid & (number >= 0) & (number < len(self._experts))
        weight = torch.where(own, routed.weight, 0).double()
        columns = weight.new_zeros(len(weight), len(self._experts), self._down.inner)
        index = torch.where(own, number, 0)[..., None].expand_as(inputs)
        columns.scatter_add_(1, index, weight[..., None] * inputs.double())
        columns = columns if self._refit else columns[:, :0]  # then only errors are counted
        wanted = call.result(call.output).double()
        rows = running_padding().rows(len(wanted), wanted.device)
        wanted = wanted[rows]
        x, y = columns.flatten(1)[rows], wanted - outputs.double()[rows]
        if self._sums is None:
            size = (x.shape[1], x.shape[1]), (x.shape[1], y.shape[1])
            self._sums = (
                _Sums(x.new_zeros(size[0]), x.new_zeros(size[1])),
                _Sums(x.new_zeros(size[0]), x.new_zeros(size[1])),
            )
        cut = len(x) - len(x) // 5
        self._sums[0].add(x[:cut], y[:cut])
        self._sums[1].add(x[cut:], y[cut:])
        self._scale += float(wanted[cut:].square().sum())
        self._tokens += len(x) - cut

    def solve(self) -> dict[str, Any]:
        """Writes the new weights; returns λ, None where none helped, and held-out sums of squares."""
        if self._sums is None or self._down is None:
            return {"damping": None, "before": 0.0, "after": 0.0, "scale": 0.0, "tokens": 0}
        fit, held_out = self._sums
        errors = {damping: held_out.error(_change(fit, damping)) for damping in DAMPINGS if self._refit}
        best = min(errors, key=errors.__getitem__, default=None)
        found = {"before": held_out.square, "scale": self._scale, "tokens": self._tokens}
        if best is None or not errors[best] < held_out.square:
            return {"damping": None, "after": held_out.square, **found}
        whole = _Sums(fit.gram + held_out.gram, fit.cross + held_out.cross)
        changes = _change(whole, best).reshape(len(self._experts), self._down.inner, -1)
        for expert, change in zip(self._experts, changes, strict=True):
            matrix = self._down.matrix(expert).data
            matrix.copy_((matrix.double() + change[: matrix.shape[1]].T).to(matrix.dtype))
        return {"damping": best, "after": errors[best], **found}


def _change(sums: _Sums, damping: float) -> Tensor:
    """The ridge solution. [experts · inner, width]"""
    ridge = damping * float(sums.gram.diagonal().mean()) or 1.0
    found = damped_solution(sums.gram[None], sums.cross[None], ridge)
    return torch.zeros_like(sums.cross) if found is None else found[0]
