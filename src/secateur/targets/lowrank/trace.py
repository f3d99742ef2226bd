"""Ranks in `sc.trace`: the directions of a factorised model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.calibration import Forward
from secateur.common.models import unwrap
from secateur.errors import NothingToPruneError
from secateur.graph.trace import trace_units
from secateur.targets.lowrank.factorise import factorise
from secateur.targets.lowrank.graph import RankGraph, rank_graph
from secateur.targets.lowrank.opened import closed
from secateur.targets.lowrank.pair import FIRST, pairs_of


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    allow_inexact: bool = False,
    forward: Forward | None = None,
) -> RankGraph:
    """Find the directions that may go from each linear layer, and nothing else: see `secateur.trace`.

    A model that `secateur.factorise` did not make is factorised by its weights alone; the result's
    ``programs.model`` is that copy.

    Raises:
        NothingToPruneError: No layer can be two layers and save something.
    """
    return traced(
        RankGraph,
        model,
        example_inputs,
        more_inputs=more_inputs,
        methods=methods,
        allow_inexact=allow_inexact,
        forward=forward,
    )


def traced(kind: type[RankGraph], model: nn.Module, example_inputs: Any, **options: Any) -> RankGraph:
    """Do what `trace` does, for directions alone or for all units."""
    model = unwrap(model)
    pairs = model if pairs_of(model) else factorise(model)
    found = rank_graph(trace_units(pairs, example_inputs, **options), kind)
    whole = {path for path in pairs_of(pairs) if f"{path}.{FIRST}" not in found.uncorrelated}
    if whole and found.uncorrelated:  # these cost what one layer costs, so one layer is what is traced
        why = [left for left in found.left if left.group.name in whole]
        found = rank_graph(trace_units(closed(pairs, whole), example_inputs, **options), kind)
        found = replace(found, left=(*found.left, *why))
    if not found.uncorrelated:
        reasons = "; ".join(f"{left.group.name}: {left.reason}" for left in found.left[:3])
        raise NothingToPruneError(
            f"trace: expected a linear layer that two layers can replace, got none. {reasons}".rstrip()
        )
    return found
