"""A model that is a chain of alike blocks, run block by block.

Language models are: an embedding, a list of blocks that each take the hidden states of the one before, and a
head. Run block by block, each block sees all the data before the next one sees any: of the hidden states only
those between two blocks are held, and each block is called, and its weights fetched if they are offloaded, by
itself. Each block is called as a module, so that hooks on it run, Accelerate's among them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.calibration import Batch, Calibration


class _NoChainError(Exception):
    """The blocks do something else than pass one tensor on."""


def lists_of(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Lists of two blocks or more of one class, the one with the most parameters first.

    Lists inside a block of another are left out, those of experts for instance.
    """
    found: dict[str, tuple[nn.Module, ...]] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}." if outer else "") for outer in found) or not isinstance(
            module, nn.ModuleList
        ):
            continue
        blocks = tuple(module)
        if len({id(b) for b in blocks}) == len(blocks) >= 2 and len({type(b) for b in blocks}) == 1:
            found[path] = blocks
    sizes = {path: sum(p.numel() for b in blocks for p in b.parameters()) for path, blocks in found.items()}
    return [found[path] for path in sorted(found, key=lambda path: -sizes[path]) if sizes[path]]


@dataclass(frozen=True)
class _Call:
    """What a block was called with: leaves of (args, kwargs), their structure, and where the state is."""

    leaves: list[Any]
    spec: Any
    place: int

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> _Call:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not places:
            raise _NoChainError
        return cls(leaves, spec, places[0])

    @property
    def state(self) -> Any:
        return self.leaves[self.place]

    def without_state(self) -> _Call:
        """The same, the hidden states let go."""
        return _Call(
            [*self.leaves[: self.place], None, *self.leaves[self.place + 1 :]], self.spec, self.place
        )

    def run(self, block: nn.Module, state: Tensor) -> Any:
        """Call a block, which runs its hooks."""
        leaves = [*self.leaves[: self.place], state, *self.leaves[self.place + 1 :]]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return block(*args, **kwargs)


@dataclass(frozen=True)
class _Output:
    """What a block returned: leaves, their structure, and where the state is among them."""

    leaves: list[Any]
    spec: Any
    place: int

    @classmethod
    def of(cls, output: Any) -> _Output:
        leaves, spec = pytree.tree_flatten(output)
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(places) != 1:
            raise _NoChainError
        return cls(leaves, spec, places[0])

    @property
    def state(self) -> Tensor:
        found: Tensor = self.leaves[self.place]
        return found

    def around(self, state: Any) -> Any:
        """The same with another state."""
        leaves = [*self.leaves[: self.place], state, *self.leaves[self.place + 1 :]]
        return pytree.tree_unflatten(leaves, self.spec)

    def without_state(self) -> _Output:
        """The same, the hidden states let go."""
        return _Output(
            [None if k == self.place else v for k, v in enumerate(self.leaves)], self.spec, self.place
        )


class _Reached(Exception):  # not an error: the first block was reached
    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call


class Chain:
    """Runs a model block by block over some data; in evaluation mode, without gradients.

    Attributes:
        blocks: In order.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], calls: list[list[_Call]], states: list[Tensor]
    ) -> None:
        self.blocks = tuple(blocks)
        self._model, self._calls, self._states, self._position = model, calls, states, 0
        self._output: _Output | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, data: Calibration, *lists: Sequence[nn.Module]) -> Chain | None:
        """The first list of blocks that is a chain, with the inputs of its first block; None if none is.

        Lists are those of `lists_of`, unless some are given.

        Whether it is one is tried on every batch: the blocks are called once each, in order, the hidden
        states that one returns go to the next untouched, and nothing else that a block returns is read.
        What each takes beside, masks and positions for instance, is kept by reference.
        """
        for blocks in lists or lists_of(model):
            try:
                return cls._gathered(model, blocks, data)
            except _NoChainError:
                continue
        return None

    @classmethod
    def _gathered(cls, model: nn.Module, blocks: Sequence[nn.Module], data: Calibration) -> Chain:
        calls: list[list[_Call]] = []
        states: list[Tensor] = []
        pattern: _Output | None = None
        for batch in data.batches():
            if pattern is None:
                first = _first_call(model, blocks[0], batch)
                pattern = _Output.of(first.run(blocks[0], first.state))
                if pattern.state.shape != first.state.shape:
                    raise _NoChainError
                del first
                pattern = pattern.without_state()
            state, found = _skeleton(model, blocks, batch, pattern)
            states.append(state)
            calls.append(found)
        return cls(model, blocks, calls, states)

    def visit(self) -> None:
        """Run the block that is next on every batch, for what its hooks see; the states stay."""
        self._run(keep=False)

    def advance(self) -> None:
        """Run the block that is next on every batch, and go on to the one behind it."""
        self._run(keep=True)
        self._position += 1

    def finish(
        self, data: Calibration, see: Callable[[Any, Batch], None] = lambda output, batch: None
    ) -> None:
        """Run what is before and behind the blocks, these passing on what the last one returned.

        Args:
            data: The batches that the chain was made with.
            see: What to do with each batch's output.
        """
        if self._output is None or self._position != len(self.blocks):
            raise RuntimeError("a chain is finished after all its blocks have run")
        for k, batch in enumerate(data.batches()):
            output = self._output.around(self._states[k])
            with ExitStack() as stack, torch.no_grad():
                for block in self.blocks:
                    stack.enter_context(_instead(block, lambda *a, output=output, **b: output))
                see(batch.run(self._model), batch)

    @torch.no_grad()
    def _run(self, *, keep: bool) -> None:
        block = self.blocks[self._position]
        for k, calls in enumerate(self._calls):
            output = _Output.of(calls[self._position].run(block, self._states[k]))
            if keep:
                self._states[k] = output.state
                self._output = output.without_state()
            del output


def _first_call(model: nn.Module, block: nn.Module, batch: Batch) -> _Call:
    """What the first block is called with; the model is not run further."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(_Call.of(args, kwargs))

    with _instead(block, stop):
        try:
            batch.run(model)
        except _Reached as reached:
            return reached.call
    raise _NoChainError


def _skeleton(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, pattern: _Output
) -> tuple[Tensor, list[_Call]]:
    """The first block's hidden states, and what each block is called with if each passes on what it got.

    Each passes on an alias of its own, so that it shows whether the next one is given just that, and whether
    anything but the next one keeps it.
    """
    found: list[_Call] = []
    first: list[Tensor] = []
    passed: list[weakref.ref[Tensor]] = []

    def passing(k: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = _Call.of(args, kwargs)
            if len(found) != k or (k and call.state is not passed[-1]()):
                raise _NoChainError
            if k > 1 and passed[-2]() is not None:
                raise _NoChainError
            if not k:
                first.append(call.state)
            found.append(call.without_state())
            alias = first[0].detach()
            passed.append(weakref.ref(alias))
            return pattern.around(alias)

        return run

    with ExitStack() as stack:
        for k, block in enumerate(blocks):
            stack.enter_context(_instead(block, passing(k)))
        batch.run(model)
    if len(found) != len(blocks):
        raise _NoChainError
    return first[0], found


@contextmanager
def _instead(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward of one module, inside the block; hooks around it that Accelerate put there rest."""
    missing = object()
    before = vars(block).get("forward", missing)
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = before
