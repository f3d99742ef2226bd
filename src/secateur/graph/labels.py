"""Labels: which positions of which axes can only be removed together.

A label is an integer for one position along one axis. Positive labels are *live*: their positions may be
removed. Labels of 0 and below are for positions that always stay: 0 for axes that hold no units (batch,
space, time, axes of size 1), a negative label where there is a reason (see `Reasons`).

`LabelStore` keeps classes of labels that belong together, as a union-find. Every operation works on whole
axes at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""The labels along one axis. [axis size]"""


@dataclass(frozen=True)
class Reason:
    """Why a position is frozen: the operator or its effect, and the source line or module."""

    what: str
    where: str = ""


class Reasons:
    """A list of reasons. Reason i has the label -(i + 1), so that a label can say why it is frozen."""

    def __init__(self) -> None:
        self._numbers: dict[Reason, int] = {}
        self._reasons: list[Reason] = []

    def label(self, reason: Reason) -> int:
        """Return the negative label of a reason; a new reason is added."""
        if reason not in self._numbers:
            self._numbers[reason] = -(len(self._reasons) + 1)
            self._reasons.append(reason)
        return self._numbers[reason]

    def __getitem__(self, label: int) -> Reason:
        """Return the reason of a label of 0 or below."""
        if label == 0:
            return Reason("tied to an axis that holds no units (batch, space or time)")
        return self._reasons[-label - 1]


class LabelStore:
    """Classes of live labels that can only be removed together, and what is frozen or mixed.

    It is a union-find: each class has one *root*, the label that stands for it.

    Example:
        >>> store = LabelStore()
        >>> a, b = store.fresh(3), store.fresh(3)
        >>> store.tie(a, b)
        >>> bool((store.find(a) == store.find(b)).all())
        True
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        self._of_parameter = np.zeros(1024, dtype=bool)  # by root
        self._stays = np.zeros(1024, dtype=bool)  # by root: whether the class is frozen already
        self._above = np.zeros(1024, dtype=np.int64)  # as `_parent`, but not shortened by `find`
        self._tied_at = np.zeros(1024, dtype=np.int64)  # in which of `_places` a label was joined to another
        self._places: list[Any] = [None]
        self._count = 1
        self._frozen: list[tuple[Labels, Labels]] = []
        self._mixed: dict[Reason, list[Labels]] = {}
        self._muted = False

    def __len__(self) -> int:
        """One more than the largest label so far."""
        return self._count

    def fresh(self, n: int, *, of_parameter: bool = False) -> Labels:
        """Make `n` new live labels in a row. `of_parameter`: whether they belong to a parameter. [n]"""
        while self._count + n > len(self._parent):
            for name in ("_parent", "_of_parameter", "_stays", "_above", "_tied_at"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        new = np.arange(self._count, self._count + n, dtype=np.int64)
        self._parent[new] = self._above[new] = new
        self._of_parameter[new] = of_parameter
        self._count += n
        return new

    def find(self, labels: Labels) -> Labels:
        """Return the root of each live label; labels of 0 and below stay as they are. [same shape]"""
        live = labels > 0
        clipped = np.where(live, labels, 0)
        root = self._parent[clipped]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                break
            self._parent[root] = self._parent[above]  # halves the path, so that long chains stay short
            root = above
        self._parent[clipped] = root
        return np.where(live, root, labels)

    def is_of_parameter(self, labels: Labels) -> bool:
        """Whether any of these labels is in a class with a position of a parameter."""
        live = labels[labels > 0]
        return bool(self._of_parameter[self.find(live)].any())

    def may_be_removed(self, labels: Labels) -> bool:
        """Whether any of these labels is in a class that is not frozen so far."""
        live = labels[labels > 0]
        return not bool(self._stays[self.find(live)].all())

    def tie(self, a: Labels, b: Labels) -> None:
        """Say that a[i] and b[i] can only be removed together. A tie to a label of 0 or below freezes."""
        a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        live_a, live_b = a > 0, b > 0
        for live, other_live, x, y in ((live_a, live_b, a, b), (live_b, live_a, b, a)):
            one_sided = live & ~other_live
            if one_sided.any():
                self.freeze(x[one_sided], y[one_sided])
        both = live_a & live_b
        if not both.any():
            return
        a, b = a[both], b[both]
        # Each round joins each root to the smallest one that it meets. Pairs that still differ then, because
        # a root met several others, are left for the next round.
        while True:
            root_a, root_b = self.find(a), self.find(b)
            differ = root_a != root_b
            if not differ.any():
                return
            a, b, root_a, root_b = a[differ], b[differ], root_a[differ], root_b[differ]
            high, low = np.maximum(root_a, root_b), np.minimum(root_a, root_b)
            np.logical_or.at(self._of_parameter, low, self._of_parameter[high])
            np.logical_or.at(self._stays, low, self._stays[high])
            np.minimum.at(self._parent, high, low)
            self._above[high], self._tied_at[high] = self._parent[high], len(self._places) - 1

    @contextmanager
    def at(self, place: Any) -> Iterator[None]:
        """Inside, `place` is remembered as what ties labels."""
        self._places.append(place)
        yield

    def tied_by(self, a: int, b: int) -> Any:
        """Return the place that joined the classes of two live labels; None if they are not joined."""
        chains = [self._chain(a), self._chain(b)]
        common = [label for label in chains[0] if label in chains[1]]
        if not common:
            return None
        steps = [label for chain in chains for label in chain[: chain.index(common[0])]]
        return self._places[max((int(self._tied_at[label]) for label in steps), default=0)]

    def _chain(self, label: int) -> list[int]:
        """Return a label, then the label that it was joined to, and so on up to the root."""
        found = [label]
        while (above := int(self._above[found[-1]])) != found[-1]:
            found.append(above)
        return found

    def freeze(self, labels: Labels, because: Labels | int) -> None:
        """Say that labels are never removed. `because` is a label of 0 or below, or one for each label."""
        labels = np.ravel(labels)
        because = np.broadcast_to(np.asarray(because, dtype=np.int64), labels.shape)
        live = labels > 0
        if live.any() and not self._muted:
            self._frozen.append((labels[live].copy(), because[live].copy()))
            self._stays[self.find(labels[live])] = True

    def mix(self, labels: Labels, reason: Reason) -> None:
        """Say that an operator mixes these positions without weights: removing one changes the others."""
        live = labels[labels > 0]
        if live.size and not self._muted:
            self._mixed.setdefault(reason, []).append(live.copy())

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Inside, labels are still tied, but nothing is frozen or mixed."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def frozen_roots(self) -> dict[int, int]:
        """Return the frozen roots, each with the label that froze it. A label with a reason wins over 0."""
        if not self._frozen:
            return {}
        roots = self.find(np.concatenate([labels for labels, _ in self._frozen]))
        because = np.concatenate([because for _, because in self._frozen])
        order = np.argsort(because == 0, kind="stable")
        found, first = np.unique(roots[order], return_index=True)
        return dict(zip(found.tolist(), because[order][first].tolist(), strict=True))

    def mixed(self) -> dict[Reason, Labels]:
        """Return the operators that mix positions, in order, each with the roots that it mixes."""
        return {
            reason: np.unique(self.find(np.concatenate(labels))) for reason, labels in self._mixed.items()
        }
