"""The largest L1 distance among many points, without visiting all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 64
"""Up to so many points, all pairs of all sets at once are faster than choosing among them."""

_ANCHORS = 4
"""Points, besides the mean, to which every point's distance is known."""

_BLOCK = 64
"""Points that are compared with others at a time."""


def diameters(points: Tensor) -> Tensor:
    r"""The largest L1 distance between two points of a set, for each set; exact.

    Every point's distance to a few anchors a (the mean, then points far from each other) bounds the distance
    of two points from above by the triangle inequality,

    .. math:: d(i, j) \le \min_a \, d(i, a) + d(a, j) .

    A pair whose bound does not exceed the largest distance found so far cannot win. Points are visited from
    the farthest from the mean inwards, so that the bounds fall, and the search ends when twice the distance
    to the mean does not exceed the best. Where no pair can be skipped, as among points that are all equally
    far from each other, each is visited once.

    Source: the triangle inequality with reference points, as in LAESA (Micó, Oncina, Vidal, 1994).

    Args:
        points: float64 [sets, points, coordinates]

    Returns:
        float64 [sets]

    Example:
        >>> diameters(torch.tensor([[[0.0, 0.0], [3.0, 1.0], [1.0, 1.0]]]))
        tensor([4.])
    """
    if points.shape[1] <= _FEW:
        return torch.cdist(points, points, p=1.0).amax(dim=(1, 2))
    return torch.stack([_diameter(each) for each in points])


def _diameter(points: Tensor) -> Tensor:
    """The largest distance in one set of points. [points, coordinates] -> []"""
    to_mean = torch.cdist(points, points.mean(dim=0, keepdim=True), p=1.0)[:, 0]
    to_mean, order = to_mean.sort(descending=True)
    points = points[order]
    anchors = _to_anchors(points)
    best = float(anchors.max())
    near = torch.cat([to_mean[None], anchors])
    for start in range(0, len(points), _BLOCK):
        if 2 * float(to_mean[start]) <= best:
            break
        # One anchor at a time: [block, rest] is small enough to stay in the cache, times anchors is not.
        bound = near[0, start : start + _BLOCK, None] + near[0, start:]
        for distance in near[1:]:
            bound = torch.minimum(bound, distance[start : start + _BLOCK, None] + distance[start:])
        hopeful = bound > best
        rows, columns = (hopeful.any(dim=d).nonzero()[:, 0] + start for d in (1, 0))
        if len(rows):
            best = max(best, float(torch.cdist(points[rows], points[columns], p=1.0).max()))
    return torch.tensor(best, dtype=points.dtype, device=points.device)


def _to_anchors(points: Tensor) -> Tensor:
    """Distances of all points to some anchors, each far from those before. [anchors, points]"""
    found: list[Tensor] = []
    chosen, nearest = 0, torch.full_like(points[:, 0], torch.inf)
    for _ in range(_ANCHORS):
        found.append(torch.cdist(points, points[chosen : chosen + 1], p=1.0)[:, 0])
        nearest = torch.minimum(nearest, found[-1])
        chosen = int(nearest.argmax())
    return torch.stack(found)
