"""Cut a program into parts that run one after another over all batches.

A part is a run of nodes. Its weights are read once for all batches. Between two parts only the values that
later nodes read are kept. So cuts lie where these are few: between two blocks of a transformer, that is the
stream of hidden states, and what all blocks read, such as masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from secateur.graph.datasizes import depends_on_data
from secateur.graph.nodes import hint
from secateur.stream.dense import Dense

PART_BYTES = 1 << 26
"""A part reads about this many bytes of weights."""


def parts(dense: Dense, limit: int | None = None) -> list[int]:
    """Return the end of each part, as a position in ``dense.nodes``, ascending. The last one is the length.

    Args:
        dense: The program.
        limit: Most bytes of weights in a part, unless a single operator reads more. Default: `PART_BYTES`.
    """
    limit = PART_BYTES if limit is None else limit
    live, weights = _live_bytes(dense), _weight_bytes(dense)
    before = [0, *accumulate(weights)]  # bytes that the nodes before each position read
    ends, start = [], 0
    for k, read in enumerate(weights):
        if start < k and before[k] - before[start] + read > limit:
            # Not too early, or parts would be many: at least a quarter of what a part may read.
            places = [at for at in range(start + 1, k + 1) if 4 * (before[at] - before[start]) >= limit]
            start = min(places or [k], key=lambda at: (live[at], -at))
            ends.append(start)
    return [*ends, len(dense.nodes)]


def _live_bytes(dense: Dense) -> Sequence[int]:
    """Bytes of the values that are held before each position, for the traced batch."""
    change = [0] * (len(dense.nodes) + 1)
    for node in (*dense.inputs, *dense.nodes):
        made = dense.index.get(node, -1) + 1
        read = max((dense.index[user] + 1 for user in node.users if user in dense.index), default=made)
        size = _bytes(node.meta.get("val"))
        change[made] += size
        change[min(read, len(dense.nodes))] -= size
    total, found = 0, []
    for each in change:
        total += each
        found.append(total)
    return found


def _weight_bytes(dense: Dense) -> list[int]:
    """Bytes of the tensors that each node is the first to read."""
    found = [0] * len(dense.nodes)
    for node in dense.names:
        first = min((dense.index[user] for user in node.users if user in dense.index), default=None)
        if first is not None:
            found[first] += _bytes(node.meta.get("val"))
    return found


def _bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    if not isinstance(value, Tensor) or any(map(depends_on_data, value.shape)):
        return 0
    return math.prod(map(hint, value.shape)) * value.dtype.itemsize
