"""A residual block, and a network with some of its blocks bypassed, which is the reference for a removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

STREAM, NOTHING, OTHER = "stream", "nothing", "other"


@dataclass(frozen=True)
class Block:
    """A module that adds to a residual stream.

    Attributes:
        path: Its path in the model.
        stream: The argument that is the stream: its position, or its name.
        returns: Empty where the block returns the stream alone. Otherwise what each entry of the returned
            tuple is: the ``stream``, ``nothing`` (None), an argument (its position or name), or something
            ``other``.
    """

    path: str
    stream: int | str
    returns: tuple[int | str, ...] = ()

    @property
    def container(self) -> str:
        """The path of the list or the sequence that the block is an entry of."""
        return self.path.rpartition(".")[0]


def argument(place: int | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the argument at a position or with a name; None if it was not given."""
    if isinstance(place, str):
        return kwargs.get(place)
    return args[place] if place < len(args) else None


def first_of(output: Any) -> Any:
    """Return the stream in a block's output: the output itself, or the first entry of a tuple or list."""
    return output[0] if isinstance(output, tuple | list) and len(output) else output


def with_first(output: Any, stream: Any) -> Any:
    """Return a block's output with another stream."""
    if not isinstance(output, tuple | list):
        return stream
    made = [stream, *output[1:]]
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(*made)
    return type(output)(made)


Hook = Callable[[Block, Tensor, Tensor], Tensor | None]
"""Called with a block, and the stream before and after it. A tensor that it returns replaces the latter."""


@contextmanager
def watching(model: nn.Module, blocks: Iterable[Block], hook: Hook) -> Iterator[None]:
    """Inside, `hook` is called after each of these blocks, and may replace the stream."""

    def after(block: Block, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        found = hook(block, argument(block.stream, args, kwargs), first_of(output))
        return None if found is None else with_first(output, found)

    handles = [
        model.get_submodule(block.path).register_forward_hook(partial(after, block), with_kwargs=True)
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassing(model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Inside, these blocks return the stream as they read it. They still run, for whatever else they return.

    The stream is copied before each block, since a block may write into it.
    """
    blocks, streams = list(blocks), dict[str, Tensor]()

    def before(block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
        streams[block.path] = argument(block.stream, args, kwargs).clone()

    with ExitStack() as undo:
        for block in blocks:
            module = model.get_submodule(block.path)
            undo.callback(module.register_forward_pre_hook(partial(before, block), with_kwargs=True).remove)
        undo.enter_context(watching(model, blocks, lambda block, *_: streams.pop(block.path)))
        yield


class PassThrough(nn.Module):
    """Takes the place of a removed block, and returns the stream unchanged.

    It is used where the list of blocks has to keep its length: the code reads it at constant positions, or
    together with another list.

    Attributes:
        stream: As in `Block`.
        returns: As in `Block`.
    """

    def __init__(self, block: Block, dense: nn.Module) -> None:
        """Copy the block's plain attributes, which code outside may read.

        Args:
            block: The block.
            dense: Its module.
        """
        super().__init__()
        for name, value in vars(dense).items():
            if not name.startswith("_") and type(value) in (bool, int, float, str):
                setattr(self, name, value)
        self.stream, self.returns = block.stream, block.returns
        self.training = dense.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would if it added nothing."""
        stream = argument(self.stream, args, kwargs)
        if not self.returns:
            return stream

        def entry(what: int | str) -> Any:
            if what == STREAM:
                return stream
            return None if what == NOTHING else argument(what, args, kwargs)

        return tuple(map(entry, self.returns))
