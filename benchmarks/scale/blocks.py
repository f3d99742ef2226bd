"""Language models block by block: Wanda's pass, the second-order update (`src/secateur/targets/weights`)."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.scale.scoring import batches
from benchmarks.scale.simulation import Meter
from benchmarks.scale.subject import Subject
from benchmarks.scale.work import Work, total
from secateur.targets.weights.blocks import lists_of


def _block(subject: Subject) -> tuple[int, nn.Module, Work, torch.Tensor]:
    """How many alike blocks there are, one, a batch through it, and the hidden states of a batch."""
    blocks = lists_of(subject.model)[0]
    seen: list[tuple[object, ...]] = []
    meters: list[Work] = []

    original = blocks[0].forward

    def forward(*args: object, **kwargs: object) -> object:
        with Meter() as meter:
            output = original(*args, **kwargs)
        meters.append(meter.work())
        seen.append(args)
        return output

    blocks[0].forward = forward  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            subject.call(subject.model, subject.batch)
    finally:
        del blocks[0].forward
    hidden = next(v for v in seen[0] if isinstance(v, torch.Tensor))
    return len(blocks), blocks[0], meters[0], hidden


def wanda(subject: Subject) -> Work:
    """`sc.score(..., "wanda", by_block=True)`: every block once, and squares of what its layers read.

    Held beside the model: the hidden states of all samples, one block's activations, and the scores of all
    weights in float64.
    """
    count, block, one, hidden = _block(subject)
    times = batches(subject.repaired, subject)
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    positions = hidden.numel() // hidden.shape[-1]
    squares = sum(positions * m.in_features * (hidden.itemsize + 28) for m in linear)
    read = Work({"bytes": squares, "calls": 8 * len(linear)})
    scored = Work({"bytes": 60 * weights})
    work = ((one + read) * times + scored) * count
    return Work(work.amounts, int(hidden.nbytes * times) + one.peak + 8 * weights * count)


def surgeon(subject: Subject) -> Work:
    r"""`masks.surgeon`: for each linear layer its block once more, its second moments, and the update.

    Of a layer with c inputs and o outputs, seen at t positions: t · c² multiply-adds in float64; a Cholesky
    factor, the inverse from it and the factor of that (c³ · 5/6 in all); and c columns one after another,
    each of which reads, computes and writes what is behind it: o · c² / 2 numbers, five times 8 bytes.

    Held beside both models: hidden states of all samples, one block's activations, four matrices of c² and
    the weight, in float64.
    """
    count, block, one, hidden = _block(subject)
    times = batches(subject.repaired, subject)
    positions = hidden.numel() / hidden.shape[-1] * times
    works = []
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            c, o = layer.in_features, layer.out_features
            works.append(
                one * times
                + Work(
                    {
                        "matmul float64": positions * c * c,
                        "factor float64": c**3 * 5 / 6,
                        "bytes": 10 * positions * c + 5 * 8 * o * c * c / 2,
                        "calls": 10 * c,
                    },
                    8 * (4 * c * c + 2 * o * c),
                )
            )
    work = (total(works) + one * times) * count
    return Work(work.amounts, subject.bytes + int(hidden.nbytes * times) + one.peak + work.peak)
