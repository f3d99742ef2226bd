"""Run a model block by block instead of batch by batch, if it is a chain of similar blocks.

A language model is an example: an embedding, a list of blocks, and a head. Each block takes the hidden states
that the block before returned. All batches go through one block before any batch goes through the next. So
only the hidden states between two blocks are kept in memory, and offloaded weights are fetched once for each
block. Each block is called as a module, so its hooks run, including those of Accelerate.
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
from secateur.calibration.padding import Padding, running


class _NoChainError(Exception):
    """The blocks are not a chain: they exchange more than one tensor, or something else reads it."""


def lists_of(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Find every `nn.ModuleList` that holds at least two different modules of one class.

    A list inside another list is left out, for example the experts inside a block.

    Returns:
        The lists, the one with the most parameters first. Lists without parameters are left out.
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
    """The arguments of one call of a block.

    Attributes:
        leaves: The values in (args, kwargs), flattened.
        spec: The structure that puts the leaves together again.
        place: Index of the hidden states among the leaves: the first floating-point tensor.
    """

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
        """This call with None in place of the hidden states, so that their memory can be freed."""
        return _Call(
            [*self.leaves[: self.place], None, *self.leaves[self.place + 1 :]], self.spec, self.place
        )

    def run(self, block: nn.Module, state: Tensor) -> Any:
        """Call a block with these arguments and other hidden states."""
        leaves = [*self.leaves[: self.place], state, *self.leaves[self.place + 1 :]]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return block(*args, **kwargs)


@dataclass(frozen=True)
class _Output:
    """The output of one call of a block.

    Attributes:
        leaves: The values in the output, flattened.
        spec: The structure that puts the leaves together again.
        place: Index of the hidden states among the leaves: the only tensor.
    """

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

    def with_state(self, state: Any) -> Any:
        """The block's output with other hidden states, in its original structure."""
        leaves = [*self.leaves[: self.place], state, *self.leaves[self.place + 1 :]]
        return pytree.tree_unflatten(leaves, self.spec)

    def without_state(self) -> _Output:
        """This output with None in place of the hidden states, so that their memory can be freed."""
        return _Output(
            [None if k == self.place else v for k, v in enumerate(self.leaves)], self.spec, self.place
        )


class _FirstBlockReached(Exception):
    """Stops the model at its first block and carries the call. It is no error."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call


class Chain:
    """A model whose blocks run one at a time over all batches, without gradients.

    The caller sets evaluation mode. Make a chain with `Chain.of`, call `advance` once for each block, then
    `finish`.

    Attributes:
        blocks: The blocks, in order of execution.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        calls: list[list[_Call]],
        states: list[Tensor],
        paddings: list[Padding],
    ) -> None:
        self.blocks, self._paddings = tuple(blocks), paddings
        self._model, self._calls, self._states, self._position = model, calls, states, 0
        self._output: _Output | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, data: Calibration, *lists: Sequence[nn.Module]) -> Chain | None:
        """Find the first list of blocks that is a chain, and record the inputs of its first block.

        A list is a chain if, on every batch, each block is called once and in order, the hidden states that
        a block returns go unchanged to the next block, and nothing else reads them. Other arguments of the
        blocks, such as attention masks and positions, are kept by reference.

        Args:
            model: The model that has the blocks.
            data: All batches of it are run.
            *lists: The lists to try. By default those of `lists_of`.

        Returns:
            The chain, or None if no list is one.
        """
        for blocks in lists or lists_of(model):
            try:
                return cls._record(model, blocks, data)
            except _NoChainError:
                continue
        return None

    @classmethod
    def _record(cls, model: nn.Module, blocks: Sequence[nn.Module], data: Calibration) -> Chain:
        """Record the calls of all blocks on all batches; only the first block really runs, on one batch."""
        calls: list[list[_Call]] = []
        states: list[Tensor] = []
        paddings: list[Padding] = []
        layout: _Output | None = None  # the structure in which blocks return their hidden states
        for batch in data.batches():
            if layout is None:
                first = _first_call(model, blocks[0], batch)
                layout = _Output.of(first.run(blocks[0], first.state))
                if layout.state.shape != first.state.shape:
                    raise _NoChainError
                del first
                layout = layout.without_state()
            state, found = _record_calls(model, blocks, batch, layout)
            states.append(state)
            calls.append(found)
            paddings.append(batch.padding)
        return cls(model, blocks, calls, states, paddings)

    def visit(self) -> None:
        """Run the next block on every batch so that its hooks see the data; stay before this block."""
        self._run(keep=False)

    def advance(self) -> None:
        """Run the next block on every batch, keep its outputs, and move on to the block after it."""
        self._run(keep=True)
        self._position += 1

    def finish(
        self, data: Calibration, see: Callable[[Any, Batch], None] = lambda output, batch: None
    ) -> None:
        """Run the rest of the model: the layers before and after the blocks.

        The blocks do not run again: each returns the recorded output of the last block.

        Args:
            data: The batches that the chain was made with.
            see: Called with the model's output and the batch.
        """
        if self._output is None or self._position != len(self.blocks):
            raise RuntimeError("a chain is finished after all its blocks have run")
        for k, batch in enumerate(data.batches()):
            output = self._output.with_state(self._states[k])
            with ExitStack() as stack, torch.no_grad():
                for block in self.blocks:
                    stack.enter_context(_replace_forward(block, lambda *a, output=output, **b: output))
                see(batch.run(self._model), batch)

    @torch.no_grad()
    def _run(self, *, keep: bool) -> None:
        block = self.blocks[self._position]
        for k, calls in enumerate(self._calls):
            with running(self._paddings[k]):
                output = _Output.of(calls[self._position].run(block, self._states[k]))
            if keep:
                self._states[k] = output.state
                self._output = output.without_state()
            del output


def _first_call(model: nn.Module, block: nn.Module, batch: Batch) -> _Call:
    """Run the model up to its first block, and return the arguments of that block."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _FirstBlockReached(_Call.of(args, kwargs))

    with _replace_forward(block, stop):
        try:
            batch.run(model)
        except _FirstBlockReached as reached:
            return reached.call
    raise _NoChainError


def _record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, layout: _Output
) -> tuple[Tensor, list[_Call]]:
    """Run the model with blocks that only pass their hidden states on, and record the call of each block.

    Each block passes on a new alias of the hidden states. If the next block gets another tensor, something
    between the blocks changes the states. If an older alias is still alive when the next block but one is
    called, something else keeps it. In both cases the blocks are not a chain.

    Returns:
        The hidden states that the first block gets, and the calls of all blocks without hidden states.

    Raises:
        _NoChainError: The blocks are not a chain.
    """
    found: list[_Call] = []
    first: list[Tensor] = []
    passed: list[weakref.ref[Tensor]] = []

    def pass_on(k: int) -> Callable[..., Any]:
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
            return layout.with_state(alias)

        return run

    with ExitStack() as stack:
        for k, block in enumerate(blocks):
            stack.enter_context(_replace_forward(block, pass_on(k)))
        batch.run(model)
    if len(found) != len(blocks):
        raise _NoChainError
    return first[0], found


@contextmanager
def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of one module inside the ``with`` block.

    Accelerate wraps `forward` with its own hooks; these do not run either. A forward that is set on the
    instance is put back afterwards.
    """
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
