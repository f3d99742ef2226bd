"""Find residual blocks by what one forward pass shows: no list of class names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.common.formatting import shorten
from secateur.common.models import evaluating
from secateur.graph.inputs import Arguments
from secateur.targets.blocks.block import NOTHING, OTHER, STREAM, Block, first_of
from secateur.targets.blocks.residual import is_residual


@dataclass
class _Seen:
    """What a forward pass showed of one module.

    Attributes:
        calls: How often it was called.
        block: The residual block, if it is one.
        reason: Why it is none.
        sources: By argument, the autograd node of a given tensor, and the tensor.
    """

    calls: int = 0
    block: Block | None = None
    reason: str = ""
    sources: dict[int | str, tuple[Any, Tensor]] = field(default_factory=dict)


def find_blocks(model: nn.Module, given: Arguments) -> tuple[list[Block], dict[str, str]]:
    """Find the blocks of a model, in order of execution.

    A block is an entry of a `ModuleList` or a `Sequential`, at any depth, that one forward pass calls once.
    It returns a tensor, or a tuple that begins with one, of the shape, dtype and device of one of its inputs,
    and adds what it computes to that input (`is_residual`). If a block consists only of equal smaller blocks,
    these are taken.

    Args:
        model: The model; it is left as it was.
        given: Its arguments.

    Returns:
        The blocks; and for other entries of the lists in which blocks were found, why they are none. If no
        block is left, this covers the lists with entries that look like blocks.
    """
    entries = _entries(model)
    seen = {path: _Seen() for path in entries}
    order: list[str] = []
    with evaluating(model), torch.enable_grad(), _watched(model, seen, order):
        model(*given[0], **given[1])
    names = _names(model)
    alike = {path.rpartition(".")[0] for path, found in seen.items() if found.block is not None}
    for path, found in seen.items():
        if found.calls != 1:
            found.block = None
            found.reason = (
                f"it is called {found.calls} times" if found.calls else "the inputs do not reach it"
            )
        elif others := [name for name in names[model.get_submodule(path)] if name != path]:
            found.block = None
            found.reason = f"the model has it under other names too: {shorten(others)}. Keep one of them"
    blocks = {path: block for path in order if (block := seen[path].block) is not None}
    chosen = _innermost(model, blocks)
    containers = {block.container for block in chosen} or alike
    left = {
        path: found.reason
        for path, found in seen.items()
        if found.reason and path.rpartition(".")[0] in containers
    }
    return chosen, left


def _entries(model: nn.Module) -> list[str]:
    """Return the paths of the modules in lists and sequences that have parameters."""
    return [
        f"{path}.{name}" if path else name
        for path, container in model.named_modules()
        if isinstance(container, nn.ModuleList | nn.Sequential)
        for name, child in container.named_children()
        if next(child.parameters(), None) is not None
    ]


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All paths of each module."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return found


@contextmanager
def _watched(model: nn.Module, seen: dict[str, _Seen], order: list[str]) -> Iterator[None]:
    """Inside, every call of an entry is judged. After each outermost entry its autograd graph is dropped."""
    depth = 0

    def before(found: _Seen, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal depth
        depth += 1
        found.calls += 1

        def marked(place: int | str, value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            own = value if value.requires_grad else value.detach().requires_grad_()
            own = own.clone()
            found.sources[place] = (own.grad_fn, value)
            return own

        return (
            tuple(marked(k, value) for k, value in enumerate(args)),
            {name: marked(name, value) for name, value in kwargs.items()},
        )

    def after(path: str, found: _Seen, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal depth
        depth -= 1
        order.append(path)
        found.block, found.reason = _judged(path, found, args, kwargs, output)
        found.sources.clear()
        if depth == 0:
            return pytree.tree_map_only(Tensor, Tensor.detach, output)
        return None

    handles = []
    try:
        for path, found in seen.items():
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(partial(before, found), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(after, path, found), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _judged(path: str, found: _Seen, args: Any, kwargs: Any, output: Any) -> tuple[Block | None, str]:
    """Return the block, or why a module is none."""
    stream = first_of(output)
    if not isinstance(stream, Tensor):
        return None, f"it returns {type(stream).__name__}, and not a tensor or a tuple that begins with one"

    def same(value: Tensor) -> bool:
        return (value.shape, value.dtype, value.device) == (stream.shape, stream.dtype, stream.device)

    fits = [place for place, (_, value) in found.sources.items() if same(value)]
    if not fits:
        return None, "its output does not have the shape of an input"
    for place in fits:
        if is_residual(stream, found.sources[place][0]):
            return Block(path, place, _returns(args, kwargs, output)), ""
    return None, "it does not add to an input"


def _returns(args: Any, kwargs: Any, output: Any) -> tuple[int | str, ...]:
    """Return what each entry of an output is; empty for a tensor alone."""
    if not isinstance(output, tuple | list):
        return ()
    places = [*enumerate(args), *kwargs.items()]

    def entry(value: Any) -> int | str:
        if value is None:
            return NOTHING
        return next((place for place, given in places if _same(given, value)), OTHER)

    if type(output) is not tuple:  # a list, or a tuple with names, which a stand-in does not make
        return (STREAM, OTHER)
    return (STREAM, *map(entry, output[1:]))


def _same(one: Any, other: Any) -> bool:
    """Whether two values are one object, or equal tensors, since inner modules are given copies."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))


def _innermost(model: nn.Module, blocks: dict[str, Block]) -> list[Block]:
    """Leave out blocks that consist only of equal smaller blocks, and blocks inside other blocks that stay.

    Blocks of equal ones are stages of a network. A block of different ones, such as attention and a
    feed-forward layer that each add to the stream, stays.
    """

    def size(path: str) -> int:
        return sum(p.numel() for p in model.get_submodule(path).parameters())

    def tensors(path: str) -> tuple[tuple[str, torch.Size], ...]:
        return tuple((name, t.shape) for name, t in model.get_submodule(path).named_parameters())

    chosen: dict[str, Block] = {}
    for path in sorted(blocks, key=lambda path: -path.count(".")):  # the innermost come first
        inner = [other for other in chosen if other.startswith(f"{path}.")]
        if inner and sum(map(size, inner)) == size(path) and len(set(map(tensors, inner))) == 1:
            continue
        for other in inner:
            del chosen[other]
        chosen[path] = blocks[path]
    return [block for path, block in blocks.items() if path in chosen]
