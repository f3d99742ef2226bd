"""The groups of a traced model, found again in a program for inputs of other sizes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
from torch.export import ExportedProgram

from secateur.errors import CalibrationError
from secateur.graph.graph import Graph
from secateur.graph.kept import Labelled
from secateur.graph.walk import walk_into


def graph_at(graph: Graph, program: ExportedProgram) -> Graph:
    """Return the graph with the labels of another program; its groups are the same.

    Args:
        graph: The trace; it is left as it was.
        program: One of ``graph.programs``.

    Raises:
        CalibrationError: At the sizes of that program, more has to be removed together than at the traced
            ones.
    """
    if program is graph.program:
        return graph
    traced, tensors = graph._labelled[None]._walk, graph._labelled[None]._tensors
    also = replace(
        traced.for_other_program(),
        store=deepcopy(traced.store),
        reasons=deepcopy(traced.reasons),
        roles=list(traced.roles),
        matched=list(traced.matched),
        dimensions=list(traced.dimensions),
    )
    walk_into(program, also, graph.program, tensors)
    known = graph._assembled.slot_of
    roots = also.store.find(np.arange(len(also.store), dtype=np.int64))
    slots, groups = np.full(len(roots), -1), np.full(len(roots), -1)
    live = np.flatnonzero(known >= 0)
    slots[roots[live]], groups[roots[live]] = known[live], graph._assembled.group_of[live]
    frozen = list(also.store.frozen_roots())
    if (slots[roots[live]] != known[live]).any() or (slots[frozen] >= 0).any():
        raise CalibrationError(
            "batches: expected sizes at which the same units can go as at the traced one, got some at which "
            "fewer can. Pass inputs of these sizes to sc.trace as more_inputs, or leave such batches out."
        )
    assembled = replace(graph._assembled, slot_of=slots[roots], group_of=groups[roots])
    labelled = {**graph._labelled, None: Labelled(program, also, tensors)}
    return replace(graph, program=program, _labelled=labelled, _assembled=assembled)
