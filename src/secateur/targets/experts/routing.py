"""Observe routers while a model runs, and exclude experts from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.errors import CalibrationError
from secateur.targets.experts.blocks import Block

_LINEAR: frozenset[Any] = frozenset(
    {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm, torch.einsum}
)


@dataclass(frozen=True)
class Routed:
    """What a block's router decided for the tokens of one batch, and what the chosen experts gave.

    Attributes:
        hidden: The input of the experts. [tokens, width]
        index: The chosen experts. [tokens, k]
        weight: The factor on the output of each chosen expert. [tokens, k]
        output: The output of each chosen expert, without that factor. [tokens, k, width]
        valid: False for choices beyond those of a token that uses fewer than k experts. [tokens, k]
    """

    hidden: Tensor
    index: Tensor
    weight: Tensor
    output: Tensor
    valid: Tensor

    def only(self, tokens: Tensor) -> Routed:
        """The same for some of the tokens. `tokens` is boolean, [tokens]."""
        return Routed(*(t[tokens] for t in (self.hidden, self.index, self.weight, self.output, self.valid)))


@dataclass(frozen=True)
class Call:
    """One call of a block, with a way to call it again on some of its tokens.

    Attributes:
        block: The block.
        module: Its module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What the block returned.
    """

    block: Block
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def hidden(self) -> Tensor:
        """The tokens that came in. [tokens, width]"""
        tensor = _hidden(self.block, (*self.args, *self.kwargs.values()))
        return tensor.reshape(-1, tensor.shape[-1])

    def result(self, output: Any) -> Tensor:
        """The first tensor of what the block returned. [tokens, width]"""
        tensor = next(t for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
        return tensor.reshape(-1, tensor.shape[-1])

    def again(self, tokens: Tensor | None = None) -> Tensor:
        """The block's output for some of its tokens, or for all. [tokens, width]"""
        hidden = _hidden(self.block, (*self.args, *self.kwargs.values()))
        args, kwargs = self.args, self.kwargs
        if tokens is not None:
            some = self.hidden[tokens].reshape(*[1] * (hidden.ndim - 2), -1, hidden.shape[-1])
            args, kwargs = pytree.tree_map(lambda v: some if v is hidden else v, (args, kwargs))
        return self.result(self.module.forward(*args, **kwargs))


def _hidden(block: Block, arguments: Iterable[Any]) -> Tensor:
    for value in arguments:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return value
    raise CalibrationError(
        f"experts {block.name}: expected a block that is called with its tokens [..., width], got no such "
        "tensor. Wrap it in a module that is called so."
    )


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module has another `forward`."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _Excluded(TorchFunctionMode):
    """Writes -inf for excluded experts into the first linear result with one entry for each expert."""

    def __init__(self, count: int, removed: Tensor) -> None:
        super().__init__()
        self._count, self._removed, self._done = count, removed, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._done or func not in _LINEAR or result.shape[-1] != self._count:
            return result
        self._done = True
        return result.masked_fill(self._removed.to(result.device), float("-inf"))


@contextmanager
def excluding(model: nn.Module, block: Block, removed: Iterable[int]) -> Iterator[None]:
    """Inside, no token goes to the removed experts: their logits are -inf, before softmax and top-k.

    A correction that is added to the scores before top-k is -inf for them too, so that a router with
    sigmoid scores excludes them as well. Afterwards the model is as it was.
    """
    positions = torch.tensor(sorted(removed), dtype=torch.int64)
    mask = torch.zeros(block.count, dtype=torch.bool)
    mask[positions] = True
    router = model.get_submodule(block.router)
    original = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Excluded(block.count, mask):
            return original(*args, **kwargs)

    with ExitStack() as undo:
        for name in block.tensors:
            path, _, leaf = name.rpartition(".")
            tensor = getattr(model.get_submodule(path), leaf)
            if tensor.ndim == 1 and "bias" in leaf:
                before = tensor.detach().clone()
                undo.callback(tensor.data.copy_, before)
                tensor.data[positions.to(tensor.device)] = float("-inf")
        undo.enter_context(replaced(router, forward))
        yield


Watcher = Callable[[Call, Callable[[], Routed]], None]
"""Called after each call of a block, without gradients; the function gives what was routed."""


@contextmanager
def watching(model: nn.Module, blocks: Iterable[Block], watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` sees every call of every block; what the model computes stays the same."""
    with ExitStack() as undo:
        for block in blocks:
            undo.enter_context(_watching(model, block, watcher))
        yield


@contextmanager
def _watching(model: nn.Module, block: Block, watcher: Watcher) -> Iterator[None]:
    module, experts = model.get_submodule(block.name), model.get_submodule(block.experts)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    inside = False
    original = experts.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not inside:
            seen[:] = [(args, kwargs)]
        return original(*args, **kwargs)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal inside
        if inside:
            return
        call = Call(block, module, args, kwargs, output)
        inside = True
        try:
            with torch.no_grad():
                if block.fused:
                    watcher(call, lambda: _of_fused(block, original, *seen[0]))
                else:
                    watcher(call, lambda: _of_list(call, experts))
        finally:
            inside = False
            seen.clear()

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        if block.fused:
            with replaced(experts, forward):
                yield
        else:
            yield
    finally:
        handle.remove()


def _of_fused(
    block: Block, experts: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Routed:
    """Read tokens, indices and weights from the arguments of the experts' own call, by shape and dtype.

    The outputs come from one more call of the same kernel, in which each choice is a token of its own.
    """
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    index = next((v for v in tensors if not v.is_floating_point() and v.ndim == 2), None)
    weight = next(
        (v for v in tensors if index is not None and v.is_floating_point() and v.shape == index.shape), None
    )
    hidden = next((v for v in tensors if v.is_floating_point() and v is not weight and v.ndim == 2), None)
    if index is None or weight is None or hidden is None or len(hidden) != len(index):
        shapes = ", ".join(f"{v.dtype} {list(v.shape)}" for v in tensors)
        raise CalibrationError(
            f"experts {block.experts}: expected a call with tokens [T, width], chosen experts [T, k] and "
            f"their weights [T, k], got {shapes or 'no tensor'}. Give the experts such a forward."
        )
    k = index.shape[1]
    each = hidden.repeat_interleave(k, dim=0), index.reshape(-1, 1), torch.ones_like(weight).reshape(-1, 1)
    new = {id(hidden): each[0], id(index): each[1], id(weight): each[2]}
    swapped: Any = pytree.tree_map(lambda v: new.get(id(v), v), (args, kwargs))
    output = experts(*swapped[0], **swapped[1]).reshape(len(hidden), k, -1)
    return Routed(hidden, index, weight, output, (index >= 0) & (index < block.count))


def _of_list(call: Call, experts: nn.Module) -> Routed:
    """Find the chosen experts and their weights by probes.

    A block returns the sum of its experts' outputs, times their weights, and perhaps something else. If each
    expert returns a unit vector of its own, a probe, the block's output shows the weights. Probes are large,
    so that what they are added to costs no precision.
    """
    modules = list(experts.children())
    hidden = call.hidden
    width = call.result(call.output).shape[-1]
    large = 2.0**10 if hidden.dtype == torch.float16 else 2.0**20

    def probed(first: int) -> Tensor:
        def unit(number: int) -> Callable[..., Tensor]:
            def forward(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
                value = tokens.new_zeros(*tokens.shape[:-1], width)
                if first <= number < first + width:
                    value[..., number - first] = large
                return value

            return forward

        with ExitStack() as undo:
            for number, module in enumerate(modules):
                undo.enter_context(replaced(module, unit(number)))
            return call.again()

    base = probed(len(modules))
    weights = torch.cat([(probed(f) - base) / large for f in range(0, len(modules), width)], dim=1)
    weights = weights[:, : len(modules)]
    k = int((weights != 0).sum(1).max()) if len(weights) else 0
    index = weights.abs().topk(k, dim=1).indices
    weight = weights.gather(1, index)
    output = hidden.new_zeros(*index.shape, width)
    for number, module in enumerate(modules):
        tokens, slots = torch.where((index == number) & (weight != 0))
        if len(tokens):
            output[tokens, slots] = module(hidden[tokens])
    return Routed(hidden, index, weight, output, weight != 0)
