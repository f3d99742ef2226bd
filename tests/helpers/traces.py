"""The small topologies, traced, for tests that leave them as they are: each is made once in a process."""

from __future__ import annotations

import functools

import torch

import secateur as sc
from secateur.targets.units.apply import Applier
from tests.helpers.models import INEXACT, TOPOLOGIES, build

BATCH = 3
"""The size of the batch that they are traced with."""


def dense(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The model."""
    return _dense(name, dtype)


def traced(name: str, dtype: torch.dtype = torch.float64, *, allow_inexact: bool = False) -> sc.Graph:
    """Its trace."""
    return _traced(name, dtype, allow_inexact and name in INEXACT)


def applier(name: str, dtype: torch.dtype = torch.float64, *, allow_inexact: bool = False) -> Applier:
    """What `sc.apply` calls, for many plans: what it captures beside the trace, it captures once."""
    return _applier(name, dtype, allow_inexact and name in INEXACT)


@functools.cache  # which takes `f(x)` and `f(x, default)` for two calls
def _dense(name: str, dtype: torch.dtype) -> torch.nn.Module:
    return build(name, dtype)


@functools.cache
def _traced(name: str, dtype: torch.dtype, allow_inexact: bool) -> sc.Graph:
    inputs = TOPOLOGIES[name].inputs(BATCH, dtype)
    return sc.trace(dense(name, dtype), inputs, allow_inexact=allow_inexact)


@functools.cache
def _applier(name: str, dtype: torch.dtype, allow_inexact: bool) -> Applier:
    return Applier(dense(name, dtype), traced(name, dtype, allow_inexact=allow_inexact))
