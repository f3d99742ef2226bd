"""Mixture-of-experts blocks, recognised by their structure: no list of class names.

A block is a module that holds experts, and a router with one row for each of them. Experts are either
a list of modules with equal tensors, or one module whose parameters have the experts along axis 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.common.models import named_tensors

_COUNTS = re.compile("expert", re.IGNORECASE)
_OTHER_COUNTS = re.compile("per_tok|shared|top_?k|size|dim|group|layer|freq|step", re.IGNORECASE)
_TOP_K = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_top_k")
_GROUPS = ("num_group", "n_group", "num_expert_group", "n_groups")
_TOP_GROUPS = ("topk_group", "top_k_group", "limited_groups")


@dataclass(frozen=True)
class Block:
    """Where a block's experts and its router are.

    Attributes:
        name: Path of the module that holds both.
        experts: Path of the list of experts, or of the module with the fused parameters.
        router: Path of the module that owns the router's weight.
        count: Number of experts.
        fused: Whether the experts are one module.
        tensors: Parameters and buffers with the experts along axis 0: of the router, and fused ones.
        attributes: Paths of numbers that repeat `count`.
        top_k: How many experts a token uses; None where neither an attribute nor a pass has told.
        routing_groups: Into how many equal groups the router parts the experts (1: it does not).
        top_groups: From how many of them a token's experts come.
    """

    name: str
    experts: str
    router: str
    count: int
    fused: bool
    tensors: tuple[str, ...]
    attributes: tuple[str, ...]
    top_k: int | None
    routing_groups: int = 1
    top_groups: int = 1

    @property
    def min_keep(self) -> int:
        """The fewest experts that the router can work with.

        As many as a token uses; where it takes them from `top_groups` of equal groups, as many as that
        needs in each, and at least two in each, because groups are ranked by their two best experts.
        """
        top_k = self.top_k or 1
        if self.routing_groups == 1:
            return top_k
        return self.routing_groups * max(2, math.ceil(top_k / self.top_groups))


def candidates(model: nn.Module) -> Iterator[list[Block]]:
    """For each set of experts, the blocks that it and a router may make up; the likeliest router first."""
    parents = {
        f"{path}.{name}" if path else name: path for path, m in model.named_modules() for name in m._modules
    }
    for path, module in model.named_modules():
        if path not in parents:
            continue
        count = _fused(module) or _listed(module)
        block = parents[path]
        if count < 2:
            continue
        found = [
            _block(model, block, path, router, count, fused=not isinstance(module, nn.ModuleList))
            for router in _routers(model.get_submodule(block), block, path, count)
        ]
        if found:
            yield found


def _fused(module: nn.Module) -> int:
    """How many experts the module's own parameters hold; 0 if it is no such module."""
    cubes = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    sizes = {p.shape[0] for p in cubes}
    return sizes.pop() if len(cubes) > 1 and len(sizes) == 1 else 0


def _listed(module: nn.Module) -> int:
    """The length of a list of modules with tensors of equal names and shapes; 0 if it is no such list."""
    if not isinstance(module, nn.ModuleList):
        return 0
    shapes = {tuple((n, t.shape) for n, t in named_tensors(m).items()) for m in module}
    return len(module) if len(shapes) == 1 and shapes.pop() else 0


def _routers(block: nn.Module, path: str, experts: str, count: int) -> list[str]:
    """Paths of modules in the block, outside the experts, that own a matrix with a row for each expert."""
    found = []
    for name, module in block.named_modules():
        full = ".".join(filter(None, (path, name)))
        if full == experts or full.startswith(f"{experts}."):
            continue
        rows = [p for p in module.parameters(recurse=False) if p.ndim == 2 and p.shape[0] == count]
        if rows:
            likely = re.search("gate|rout", name.rpartition(".")[2]) is not None
            found.append((not likely, name.count("."), full))
    return [full for *_, full in sorted(found)]


def _block(model: nn.Module, name: str, experts: str, router: str, count: int, *, fused: bool) -> Block:
    tensors = [t for t in _tensors(model, router, count)]
    if router != name:  # a block may own a correction bias
        tensors += [t for t in _tensors(model, name, count) if _ndim(model, t) == 1]
    if fused:
        tensors += _tensors(model, experts, count)
    owners = [model.get_submodule(path) for path in (router, name, experts)]
    groups = _first(owners, _GROUPS) or 1
    return Block(
        name=name,
        experts=experts,
        router=router,
        count=count,
        fused=fused,
        tensors=tuple(dict.fromkeys(tensors)),
        attributes=(),
        top_k=_first([*owners, getattr(model, "config", None)], _TOP_K),
        routing_groups=groups,
        top_groups=_first(owners, _TOP_GROUPS) or groups,
    )


def _tensors(model: nn.Module, path: str, count: int) -> list[str]:
    module = model.get_submodule(path)
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [f"{path}.{n}" if path else n for n, t in own if t.ndim and t.shape[0] == count]


def _ndim(model: nn.Module, name: str) -> int:
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return tensor.ndim


def _first(owners: list[Any], names: tuple[str, ...]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def counts_in(owner: Any, count: int, *, named: bool = True) -> list[str]:
    """Attributes of a module or a configuration that repeat the number of experts.

    Args:
        owner: A module, or any object with attributes.
        count: The number.
        named: Only those whose name says so; else every one with that value.
    """
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and value == count
        and (not named or is_count(name))
    ]


def is_count(name: str) -> bool:
    """Whether an attribute or a field of this name says how many routed experts there are.

    Example:
        >>> [is_count(n) for n in ("num_local_experts", "n_routed_experts", "num_experts_per_tok")]
        [True, True, False]
        >>> is_count("n_shared_experts")
        False
    """
    return _COUNTS.search(name) is not None and _OTHER_COUNTS.search(name) is None
