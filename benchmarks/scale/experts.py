"""What scoring and repairing the experts of a mixture takes: `src/secateur/targets/experts`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks.scale.scoring import batches
from benchmarks.scale.simulation import Meter
from benchmarks.scale.subject import Subject
from benchmarks.scale.work import Work
from secateur.targets.experts.blocks import Block
from secateur.targets.experts.graph import expert_parameters
from secateur.targets.experts.repair import DAMPINGS, _inner, passes
from secateur.targets.experts.routing import replaced


@dataclass(frozen=True)
class Mixture:
    """One block of experts.

    Attributes:
        block: Where.
        used: Experts that a token uses.
        matrices: Numbers in the matrices of all experts.
        inner: Of a down-projection.
        width: Of a token.
        item: Bytes of a number.
    """

    block: Block
    used: int
    matrices: int
    inner: int
    width: int
    item: int

    @property
    def count(self) -> int:
        """Experts."""
        return self.block.count

    def forward(self, tokens: int, kind: str) -> Work:
        """Every token through the experts that it uses; they give and take what their matrices' sides are."""
        each = self.matrices // self.count
        rows = tokens * self.used
        moved = self.matrices * self.item + rows * self.item * (4 * self.width + 8 * self.inner)
        return Work(
            {f"matmul {kind}": rows * each, "bytes": moved, "calls": 8 * self.count}, self.saved(tokens)
        )

    def saved(self, tokens: int) -> int:
        """Bytes that backward needs: inputs, both halves of the gate, its activation, product and output."""
        return tokens * self.used * self.item * (2 * self.width + 4 * self.inner)


def mixtures(subject: Subject) -> list[Mixture]:
    """Every block that `sc.trace` finds."""
    model = subject.model
    graph = sc.trace(
        model, {k: v for k, v in subject.inputs(1).items() if k != "labels"}, granularity="expert"
    )
    found = []
    for block in graph.blocks:
        stored = [p for _, p, _ in expert_parameters(model, block) if p.ndim == 2 + block.fused]
        router = model.get_submodule(block.router)
        width = next(p.shape[1] for p in router.parameters(recurse=False) if p.ndim == 2)
        size = sum(p.numel() for p in stored)
        inner, item = _inner(model, block), stored[0].itemsize
        found.append(Mixture(block, block.top_k or 1, size, inner, width, item))
    return found


def outside(subject: Subject, found: list[Mixture], *, backward: bool) -> Work:
    """One batch through everything but the experts; with `backward`, gradients flow to the first of them."""
    model = subject.model
    seed = torch.ones((), device="meta", dtype=next(model.parameters()).dtype, requires_grad=backward)

    def passed(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden * seed

    frozen = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        with ExitStack() as undo, torch.set_grad_enabled(backward), Meter() as meter:
            for mixture in found:
                experts: nn.Module = model.get_submodule(mixture.block.experts)
                for module in [experts] if mixture.block.fused else experts.children():
                    undo.enter_context(replaced(module, passed))
            output = subject.call(model, subject.batch)
            if backward:
                torch.autograd.grad(subject.loss(output), [seed])
    finally:
        for parameter, required in frozen:
            parameter.requires_grad_(required)
    return meter.work()


def score(subject: Subject, found: list[Mixture]) -> Work:
    """`signals/experts/score.py` with `reap` and `expert_taylor`: forward, experts once more, backward.

    Watching calls the experts' kernel again, each choice a token of its own (as many multiply-adds), and
    takes norms of all outputs in float64. Backward takes twice what forward does inside the experts; their
    gradients are multiplied with the weights in float64 and freed block by block, so that of one
    parameter's gradient, its conversions and its product are held: 24 bytes a number and the item.
    """
    tokens = subject.batch * _length(subject)
    kind = str(next(subject.model.parameters()).dtype).removeprefix("torch.")
    base = outside(subject, found, backward=True)
    forward = [m.forward(tokens, kind) for m in found]
    routed = [Work({"bytes": tokens * m.used * m.width * (2 * m.item + 4 * 8)}) for m in found]
    products = [Work({"bytes": m.matrices * (2 * (m.item + 8) + 40), "calls": 8}) for m in found]
    amounts = base
    for own, watching, product in zip(forward, routed, products, strict=True):
        amounts += own * 4 + watching + product
    saved = sum(m.saved(tokens) for m in found)
    largest = max(m.matrices * 2 // 3 * (24 + m.item) for m in found)
    peak = base.peak + saved + max(largest, max(2 * m.saved(tokens) for m in found))
    return Work(amounts.amounts, peak) * batches(subject.samples, subject)


def repair(subject: Subject, found: list[Mixture], share: float = 0.5, memory: int = 2**31) -> Work:
    r"""`targets/experts/repair.py`: dense forward, each pruned block, as many experts together as fit.

    With k experts of inner size i together, and width w, c = k · i columns: t · c · (c + w) multiply-adds in
    float64 for t tokens, then for every damping and the end a Cholesky factor (c³ / 6), its solves (c² · w)
    and the held-out error (c² · w). Held: for all that one pass refits, 2 · 8 · c² bytes of sums, as much of
    cross products as c · w, and while one is solved three matrices more. One batch's columns are held as
    well: 8 · t · c.
    """
    tokens = subject.batch * _length(subject)
    kind = str(next(subject.model.parameters()).dtype).removeprefix("torch.")
    count = batches(subject.repaired, subject)
    by_name = {m.block.name: m for m in found}
    kept = {m.block.name: round(m.count * share) for m in found}
    passed = passes(subject.model, [m.block for m in found], kept, memory)
    dense = outside(subject, found, backward=False)
    for m in found:
        dense += m.forward(tokens, kind)
    work = dense * (count * len(passed))
    widest = held = 0
    solves = len(DAMPINGS) + 1
    for parts in passed:
        here = 0
        for part in parts:
            m = by_name[part.block.name]
            c = len(part.experts) * m.inner
            work += m.forward(tokens, kind) * (3 * count)
            work += Work({"matmul float64": tokens * c * (c + m.width), "bytes": tokens * c * 8 * 4}) * count
            solved = {"matmul float64": 2 * c * c * m.width, "factor float64": c**3 / 6, "bytes": 56 * c * c}
            work += Work(solved) * solves
            here += 2 * 8 * c * (c + m.width)
            widest = max(widest, 8 * (3 * c * c + 2 * c * m.width), 2 * 8 * tokens * c)
        held = max(held, here)
    return Work(work.amounts, held + widest + subject.bytes)


def _length(subject: Subject) -> int:
    return int(subject.inputs(1)["input_ids"].shape[1])
