"""The small topologies, traced, for tests that leave them as they are: each is made once in a process."""

from __future__ import annotations

import functools

import torch

import secateur as sc
from secateur.targets.units.apply import Applier
from tests.helpers.models import TOPOLOGIES, build

BATCH = 3
"""The size of the batch that they are traced with."""


@functools.cache
def dense(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The model."""
    return build(name, dtype)


@functools.cache
def traced(name: str, dtype: torch.dtype = torch.float64, *, allow_inexact: bool = False) -> sc.Graph:
    """Its trace."""
    inputs = TOPOLOGIES[name].inputs(BATCH, dtype)
    return sc.trace(dense(name, dtype), inputs, allow_inexact=allow_inexact)


@functools.cache
def applier(name: str, dtype: torch.dtype = torch.float64, *, allow_inexact: bool = False) -> Applier:
    """What `sc.apply` calls, for many plans: what it captures beside the trace, it captures once."""
    return Applier(dense(name, dtype), traced(name, dtype, allow_inexact=allow_inexact))
