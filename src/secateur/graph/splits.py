"""Which axis of a split carries the units, where the labels leave it open.

A channel axis that becomes (heads, head size), or (groups, channels a group), could go on along either.
A trial walk gives every resulting axis labels of its own and so shows where each leads:

1. an axis that an operator freezes, or sums over without weights (head size in q k^T), is unfit;
2. of the fit ones, the one tied to axes of the most other splits is taken (heads of q, k and v meet as
   batch axes of the same products);
3. else the largest, of equals the innermost.
"""

from __future__ import annotations

import numpy as np

from secateur.graph.rules.op import Walk


def decide(trial: Walk) -> dict[tuple[str, int], int]:
    """The carrying axis of each split, from a walk that collected them."""
    store = trial.store
    unfit = set(store.frozen_roots()).union(*(roots.tolist() for roots in store.mixed().values()))
    roots = [[frozenset(store.find(labels).tolist()) for labels in split.trial] for split in trial.splits]
    met: dict[int, set[int]] = {}  # root -> the splits that have an axis with it
    for number, axes in enumerate(roots):
        for root in set().union(*axes):
            met.setdefault(root, set()).add(number)
    tied = {
        axis: len(set().union(*(met[root] for root in axis)))
        for axis in dict.fromkeys(axis for axes in roots for axis in axes)
    }
    choices = {}
    for split, axes in zip(trial.splits, roots, strict=True):
        ranks = [
            (not axis & unfit, tied[axis], size, k)
            for k, (axis, size) in enumerate(zip(axes, split.sizes, strict=True))
        ]
        choices[split.key] = int(np.argmax([sorted(ranks).index(rank) for rank in ranks]))
    return choices
