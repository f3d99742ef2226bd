"""Which values of its inputs a model takes. Ordinary forward passes of the dense model show it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from secateur.graph.inputs import Arguments, InputSpec
from secateur.graph.leaf import Range


def widened(
    spec: InputSpec,
    given: Arguments,
    program: ExportedProgram,
    attempt: Callable[[Arguments], Exception | None],
    device: torch.device,
    *,
    long: bool = False,
) -> InputSpec:
    """Add to a description the ranges of values that the model takes, and whether it takes drawn values.

    Integers are drawn from the whole vocabulary if the model runs on that. Negative ones that only mark
    positions, as -100 among labels, are left out if the model fails on them. Floats are normal noise if the
    model runs on that; if not, they lie between the smallest and the largest value of the user's own tensor.
    Where a pass is `long`, a single tensor of noise is tried at other sizes only, not at the traced one.
    """
    inputs = [
        node
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in set(program.graph_signature.user_inputs)
    ]
    tensors = [n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    entries: dict[str, Range] = {}
    for name, node in zip(spec.tensors(), tensors, strict=False):
        if (rows := _vocabulary(node)) is not None:
            entries[name] = (0, rows - 1)
    seen = _seen_ranges(spec, given)
    not_negative = {
        name: (0, leaf.high)
        for name, leaf in spec.tensors().items()
        if isinstance(leaf.low, int) and leaf.high is not None and leaf.low < 0 <= leaf.high
    } | entries
    options = [entries, {}, not_negative, {**seen, **entries}, seen, {**seen, **not_negative}]
    for changes in [option for i, option in enumerate(options) if option not in options[:i]]:
        trial = spec.with_ranges(changes)
        examples = trial.examples(device=device)
        if long and not changes and len(spec.tensors()) == 1:
            examples = examples[1:] or examples
        if all(attempt((args, kwargs)) is None for _, args, kwargs in examples):
            return trial
    return spec.model_copy(update={"drawn": False})


def _seen_ranges(spec: InputSpec, given: Arguments) -> dict[str, Range]:
    """Return the smallest and largest value of each tensor that would be drawn as normal noise."""
    values = [v.detach() for v in pytree.tree_leaves(given) if isinstance(v, torch.Tensor)]
    found: dict[str, Range] = {}
    for (name, leaf), value in zip(spec.tensors().items(), values, strict=True):
        if value.is_floating_point() and leaf.low is None and value.numel():
            low, high = float(value.min()), float(value.max())
            if math.isfinite(low) and math.isfinite(high):
                found[name] = (low, high)
    return found


_SAME_VALUES = (
    "to",
    "clone",
    "contiguous",
    "view",
    "reshape",
    "unsqueeze",
    "flatten",
    "long",
    "int",
    "slice",
    "detach",
)


def _vocabulary(node: fx.Node) -> int | None:
    """Return the rows of the smallest embedding that reads an integer input; None if none does."""
    found: list[int] = []
    pending = [node]
    while pending:
        for user in pending.pop().users:
            name = str(user.target)
            table = user.args[0]
            if name.startswith("aten.embedding.") and isinstance(table, fx.Node):
                found.append(int(table.meta["val"].shape[0]))
            elif any(name.startswith((f"aten.{n}.", f"aten._{n}_copy.")) for n in _SAME_VALUES):
                pending.append(user)
    return min(found, default=None)
