"""Which axis carries the units where one axis is split into several.

An axis of channels may become (heads, head size), or (groups, channels in a group). A unit could then be a
position of either axis: a whole head, or the same channel in every head. Labels alone do not decide, so a
first walk gives each new axis labels of its own, and shows what the operators behind do with it:

1. An axis that an operator freezes, or sums over without weights, is ruled out. In attention that is the head
   size, which q k^T sums over.
2. Of the others, the axis that is tied to axes of the most other splits is taken. In attention these are the
   heads: those of q, k and v meet as batch axes of the same products.
3. If there are several such axes, the largest is taken; of equally large ones, the innermost.

If the dimensions of heads are to carry the units, two rules come first:

1. An axis that a product of two activations sums over is taken: the size of the heads of q and k.
2. An axis that is tied to the other axis of such a split, the heads, is ruled out. Of v, its size is left.
"""

from __future__ import annotations

import numpy as np

from secateur.graph.rules.op import Walk

Key = tuple[str, int]


def decide(trial: Walk) -> tuple[dict[Key, int], frozenset[Key]]:
    """Return, for each split of the first walk, the number of the axis that carries the units.

    Returns:
        These numbers, and the splits of which the chosen axis is the size of attention heads.
    """
    store = trial.store
    unfit = set(store.frozen_roots()).union(*(roots.tolist() for roots in store.mixed().values()))
    roots = [[frozenset(store.find(labels).tolist()) for labels in split.trial] for split in trial.splits]
    met: dict[int, set[int]] = {}  # root -> the splits that have an axis in its class
    for number, axes in enumerate(roots):
        for root in set().union(*axes):
            met.setdefault(root, set()).add(number)
    tied = {
        axis: len(set().union(*(met[root] for root in axis)))
        for axis in dict.fromkeys(axis for axes in roots for axis in axes)
    }
    summed = set().union(*(store.find(labels).tolist() for labels in trial.matched))
    heads = set().union(
        *(axis for axes in roots if any(axis & summed for axis in axes) for axis in axes if not axis & summed)
    )
    choices, sized = {}, set()
    for split, axes in zip(trial.splits, roots, strict=True):
        ranks = [
            (bool(axis & summed), not axis & heads, not axis & unfit, tied[axis], size, k)
            for k, (axis, size) in enumerate(zip(axes, split.sizes, strict=True))
        ]
        chosen = int(np.argmax([sorted(ranks).index(rank) for rank in ranks]))
        choices[split.key] = chosen
        if any(axis & (summed | heads) for axis in axes) and not axes[chosen] & heads:
            sized.add(split.key)
    return choices, frozenset(sized)
