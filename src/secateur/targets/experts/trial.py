"""A trial of each block: remove some experts, and compare with a router that excludes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.foreign import error_text
from secateur.errors import SecateurError
from secateur.graph.inputs import InputSpec
from secateur.measure.kernels import with_loop
from secateur.plan import Plan
from secateur.targets.experts.blocks import Block, counts_in
from secateur.targets.experts.counts import keep_masks, new_counts
from secateur.targets.experts.graph import ExpertGraph, build
from secateur.targets.experts.routing import Call, Routed, excluding
from secateur.targets.units.compare import Way, relative_difference, run_doubled
from secateur.targets.units.copying import duplicate
from secateur.targets.units.module_form.module import smaller_module

TOLERANCE = 1e-9
_TOKENS = 256
"""Most tokens that a trial runs on."""


@dataclass(frozen=True)
class Seen:
    """What one forward pass on the example inputs showed of a block.

    Attributes:
        args: Positional arguments of its call, for a few tokens.
        kwargs: Keyword arguments.
        used: How many tokens used each expert. [experts]
        top_k: The most experts that a token used.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    used: NDArray[np.int64]
    top_k: int

    @classmethod
    def of(cls, call: Call, routed: Routed) -> Seen:
        """Of one call."""

        def few(value: Any) -> Any:
            if not _has_tokens(value):
                return value
            return (value[:1, :_TOKENS] if value.ndim == 3 else value[:_TOKENS]).detach().clone()

        args, kwargs = pytree.tree_map(few, (call.args, call.kwargs))
        used = torch.bincount(routed.index[routed.valid], minlength=call.block.count)
        return cls(args, kwargs, used.cpu().numpy(), int(routed.valid.sum(1).max()))


def tried(model: nn.Module, block: Block, seen: Seen) -> Block | str:
    """The block with its attributes and the number of experts a token uses; or why it is left alone.

    Three removals are tried on float64 copies of the block alone: the most used experts, and all but the
    fewest that may stay, from either end of that order, so that mostly each expert is removed once. Each has
    to give what the dense block gives when its router may not choose them, for several numbers of tokens:
    code may do something else for few or many, with an expert of a fixed number. In training mode the
    smaller block has to run where the dense one does. Values are not compared there: routers draw noise.
    """
    block = replace(block, top_k=seen.top_k)
    if block.count % block.routing_groups:
        return f"its {block.count} experts do not part into {block.routing_groups} equal routing groups"
    if block.count - block.routing_groups < block.min_keep:
        return f"a token uses {block.top_k} of its {block.count} experts: none can go"
    reason = ""
    for named in (True, False):
        full = replace(block, attributes=tuple(_attributes(model, block, named=named)))
        try:
            faults = (_fault(model, full, seen, removed) for removed in _removals(full, seen.used))
            reason = next(filter(None, faults), "")
        except SecateurError as error:
            return str(error)
        except Exception as error:  # whatever a wrong reading of a user's module leads to
            reason = f"it failed with experts removed ({error_text(error)})"
        if not reason:
            return full
    return reason


def _attributes(model: nn.Module, block: Block, *, named: bool) -> Iterator[str]:
    for path in dict.fromkeys((block.name, block.router, block.experts)):
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            continue  # its own sizes follow its weight
        for name in counts_in(module, block.count, named=named):
            yield f"{path}.{name}" if path else name


def _removals(block: Block, used: NDArray[np.int64]) -> list[list[int]]:
    """The most used expert of each routing group; then all but the fewest that may stay, from both ends."""
    per_group = block.count // block.routing_groups
    orders = [
        start + np.argsort(-used[start : start + per_group], kind="stable")
        for start in range(0, block.count, per_group)
    ]
    most = per_group - block.min_keep // block.routing_groups
    options = [(1, orders), (most, orders), (most, [order[::-1] for order in orders])]
    found = [sorted(int(i) for order in some for i in order[:n]) for n, some in options]
    return [removed for i, removed in enumerate(found) if removed not in found[:i]]


def _fault(model: nn.Module, block: Block, seen: Seen, removed: list[int]) -> str:
    """What goes wrong where these experts are removed; empty if nothing does."""
    module = model.get_submodule(block.name)
    inner = _inside(block)
    graph: ExpertGraph = build(module, [inner], [], InputSpec(), macs=0, tokens=0, proven=False)
    plan = Plan.build(graph, keep_masks(inner, removed), allocator="trial")
    small = with_loop(smaller_module(module, plan, new_counts(module, graph, plan)).double())
    dense = with_loop(duplicate(module).double())
    with excluding(dense, inner, removed):
        for tokens, (args, kwargs) in _inputs(seen):
            try:
                wanted = run_doubled(dense, args, kwargs)
            except Exception:
                if not tokens:  # as the model called it
                    raise
                continue
            where = f" for {tokens} tokens" if tokens else ""
            try:
                worst = relative_difference(run_doubled(small, args, kwargs), wanted)
            except Exception as error:  # whatever a wrong reading of a user's module leads to
                return f"it failed with experts removed{where} ({error_text(error)})"
            if not worst <= TOLERANCE:
                return (
                    "removing experts did not give what excluding them gives "
                    f"(they differ by {worst:.1g}{where})"
                )
        return _fault_in_training(dense, small, seen)


def _fault_in_training(dense: nn.Module, small: nn.Module, seen: Seen) -> str:
    way = Way(training=True)
    with seeded(0):
        try:
            run_doubled(dense, seen.args, seen.kwargs, way=way)
        except Exception:  # what the dense block cannot do, the smaller one need not
            return ""
        try:
            run_doubled(small, seen.args, seen.kwargs, way=way)
        except Exception as error:  # a user's forward may fail in any way
            return f"in training mode it failed with experts removed ({error_text(error)})"
    return ""


def _inputs(seen: Seen) -> Iterator[tuple[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments as seen, then with other numbers of tokens; each with that number, 0 for those seen."""
    given = (seen.args, seen.kwargs)
    yield 0, given
    floats = [v for v in pytree.tree_leaves(given) if _has_tokens(v)]
    for count in (1, 3, 2 * floats[0].shape[-2] + 1) if floats else ():

        def resized(value: Any, count: int = count) -> Any:
            if not _has_tokens(value):
                return value
            return value.index_select(-2, torch.arange(count, device=value.device) % value.shape[-2])

        yield count, pytree.tree_map(resized, given)


def _has_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (2, 3)


def _inside(block: Block) -> Block:
    """The block with paths as seen from its own module."""

    def inner(path: str) -> str:
        return path.removeprefix(block.name).removeprefix(".")

    return replace(
        block,
        name="",
        experts=inner(block.experts),
        router=inner(block.router),
        tensors=tuple(map(inner, block.tensors)),
        attributes=tuple(map(inner, block.attributes)),
    )
