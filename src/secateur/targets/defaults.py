"""The rule that a name means for experts, or for blocks: with signals that these have."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.allocators import EMP, Global, ToD, Uniform
from secateur.allocators.base import Allocator

EXPERTS: Mapping[str, Allocator] = MappingProxyType(
    {
        "tod": ToD(removal="reap", protection="expert_taylor"),
        "emp": EMP(removal="reap"),
        "global": Global(removal="reap"),
        "uniform": Uniform(removal="reap"),
        "random": Uniform(removal="random"),
    }
)

BLOCKS: Mapping[str, Allocator] = MappingProxyType(
    {
        "global": Global(removal="output_change"),
        "tod": ToD(removal="output_change", protection="block_taylor"),
        "emp": EMP(removal="output_change"),
        "uniform": Uniform(removal="output_change"),
        "random": Uniform(removal="random"),
    }
)
