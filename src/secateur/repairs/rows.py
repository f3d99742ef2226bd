"""The rows of a layer's regression: what the pruned layer reads, and what it should give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secateur.repairs.pairs import Pair
from secateur.repairs.regression.additions import Addition
from secateur.repairs.regression.layers import Site, counted
from secateur.repairs.regression.leastsquares import Sums
from secateur.repairs.tasks import Task
from secateur.stream.dense import Values

_FAINT = 1e-3
"""A channel's output may be scaled before an addition. If its factor is smaller than this, relative to the
largest one, the target is not corrected for the sum: that would need huge weights."""


def column_sums(
    calls: Sequence[tuple[Site, Addition | None]],
    tasks: Sequence[Task],
    pair: Pair,
    values: Values,
    generator: torch.Generator,
    most: int,
) -> Iterator[Sums]:
    """Yield the sums of regressions on a layer's input, over one batch, a few samples at a time.

    Args:
        calls: Layer calls that read the same columns, each with the addition that its target is corrected
            for, or None. Their outputs lie one after another in the sums.
        tasks: The task of each call's weight.
        pair: The programs.
        values: The batch's values just before the calls.
        generator: Draws the positions.
        most: Most positions to take from each sample.
    """
    site = calls[0][0]
    call, tensor = pair.planned[site.node], pair.tensor(site.weight)
    wanted = [target(each, addition, pair, values) for each, addition in calls]
    x: Tensor = pair.small_value(site.x, values)
    for real, piece in site.pieces(call, tensor, values.padding, x, *reversed(wanted), most=most):
        places = site.draw(call, tensor, piece[-1], most, generator, real)
        rows = counted(real, places)
        ys = []
        for (each, _), task, end in zip(calls, tasks, reversed(piece[1:]), strict=True):
            y = each.layer.targets(end, pair.tensor(each.weight), pair.planned[each.node], places)
            if each.bias is not None and task.bias is None:  # it is not refitted
                y = y - pair.tensor(each.bias).reshape(len(y), 1, -1)
            ys.append(y)
        yield Sums.of(site.layer.columns(piece[0], tensor, call, places)[:, rows], torch.cat(ys, 2)[:, rows])


def output_sums(
    site: Site, addition: Addition | None, task: Task, pair: Pair, values: Values
) -> Iterator[Sums]:
    """Yield the sums of regressions on a layer's output, one column for each output; see `column_sums`."""
    call, tensor = pair.planned[site.node], pair.tensor(site.weight)
    bias = None if site.bias is None else pair.tensor(site.bias)
    wanted = target(site, addition, pair, values)
    own_value = pair.small_value(site.node, values)
    for real, (a, b) in site.pieces(call, tensor, values.padding, own_value, wanted):
        own, y = (site.layer.targets(v, tensor, call)[:, counted(real)] for v in (a, b))
        if bias is not None:
            own = own - bias.reshape(len(own), 1, -1)
            y = y - bias.reshape(len(y), 1, -1) if task.bias is None else y  # it is not refitted
        yield Sums.of(*(v.transpose(1, 2).flatten(0, 1)[..., None] for v in (own, y)))


@torch.no_grad()
def target(site: Site, addition: Addition | None, pair: Pair, values: Values) -> Tensor:
    """Return the target of a layer's output for one batch, in the shape of the pruned output.

    Without `addition`, the target is the dense program's output.

    With `addition`, the output goes through a chain of nodes into a sum whose other operand is already
    computed. The sum should equal the dense sum. So the error of the other operand (dense minus pruned) is
    added to the target. In this way each addition of a residual stream corrects the error that the stream
    has collected before it.

    Args:
        site: The layer call.
        addition: The addition that reads the output, or None.
        pair: The programs.
        values: The batch's values just before the call.
    """
    wanted: Tensor = pair.dense_value(site.node, values)
    if addition is None:
        return wanted
    # The chain is affine per channel in the pruned program: chain(x) = factor * x + shift. Two runs, on
    # zeros and on ones, give both.
    zero = torch.zeros_like(wanted[:1])
    shift = pair.run_chain(addition.chain, site.node, zero, dense=False)
    factor = pair.run_chain(addition.chain, site.node, zero + 1, dense=False) - shift
    drift = pair.dense_value(addition.other, values) - pair.small_value(addition.other, values)
    if addition.chain:
        into = pair.run_chain(addition.chain, site.node, wanted, dense=True)
        corrected = (into + drift - shift) / factor
    else:
        corrected = wanted + drift
    return torch.where(factor.abs() > _FAINT * factor.abs().max(), corrected, wanted)
