"""Whether zeros in the weights that produce units make an activation zero for these units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from secateur.graph.labels import Labels
from secateur.graph.rules.naming import operator_name
from secateur.graph.rules.weights import PRODUCTS, SUMS, ZERO_AT_ZERO, adds_number

if TYPE_CHECKING:
    from secateur.graph.rules.op import Walk


def silenced(walk: Walk, activation: fx.Node, labels: Labels) -> bool:
    """Whether an activation is zero for units whose producing weights and biases are zero.

    The operators between the producers and the activation are followed back. They may move, scale and add
    numbers, as a rotary embedding does. Any other operator may make something of a zero.

    Args:
        walk: What the rules said so far.
        activation: The activation.
        labels: The labels of the units along one of its axes.
    """
    roots = np.unique(walk.store.find(labels[labels > 0]))
    axes = {produced.node: produced.axis for produced in walk.produced}
    known: dict[fx.Node, bool] = {}
    pending = [activation]  # a stack in place of recursion, since programs can be deep
    while pending:
        node = pending[-1]
        name, sources = operator_name(node), node.all_input_nodes
        if node in axes:
            values = walk.values[node]
            produced = values[axes[node]] if isinstance(values, tuple) else labels[:0]
            known[node] = bool(np.isin(roots, walk.store.find(produced)).all())
            needed: list[fx.Node] = []
        elif name in ZERO_AT_ZERO:
            needed = sources[:1]
        elif name in PRODUCTS or (name in SUMS and not adds_number(node)):
            needed = sources
        else:
            needed, known[node] = [], False
        waiting = [source for source in needed if source not in known]
        if waiting and node not in known:
            pending += waiting
            continue
        pending.pop()
        if node not in known:
            found = [known[source] for source in needed]
            known[node] = any(found) if name in PRODUCTS else bool(found) and all(found)
    return known[activation]
