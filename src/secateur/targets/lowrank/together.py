"""Ranks in `sc.trace`, together with channels, neurons and heads."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from secateur.targets.lowrank import trace as alone
from secateur.targets.lowrank.graph import RankGraph, UnitsAndRanks


@wraps(alone.trace, assigned=())
def trace(model: nn.Module, example_inputs: Any, **options: Any) -> RankGraph:
    """Find all units of a factorised model: the directions of its layers, and channels, neurons and heads.

    It takes what the trace of ranks alone takes.
    """
    return alone.traced(UnitsAndRanks, model, example_inputs, **options)
