from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.graph.labels import LabelStore, Reason, Reasons

LABELS = 12
pairs = st.lists(st.tuples(st.integers(-2, LABELS), st.integers(-2, LABELS)), max_size=25)


class Naive:
    """Classes as sets; label <= 0 is nothing to merge with."""

    def __init__(self, n: int) -> None:
        self.classes = [{i} for i in range(1, n + 1)]

    def tie(self, a: int, b: int) -> None:
        if a <= 0 or b <= 0:
            return
        one, other = (next(c for c in self.classes if x in c) for x in (a, b))
        if one is not other:
            one |= other
            self.classes.remove(other)

    def root(self, label: int) -> int:
        return min(next(c for c in self.classes if label in c)) if label > 0 else label


@given(batches=st.lists(pairs, max_size=4))
def test_union_find_is_that_of_sets(batches: list[list[tuple[int, int]]]) -> None:
    store, naive = LabelStore(), Naive(LABELS)
    store.fresh(LABELS)
    for batch in batches:
        a, b = (np.array([pair[side] for pair in batch], dtype=np.int64) for side in (0, 1))
        store.tie(a, b)
        for left, right in batch:
            naive.tie(left, right)
        every = np.arange(-2, LABELS + 1)
        assert store.find(every).tolist() == [naive.root(int(label)) for label in every]


@given(batch=pairs)
def test_what_is_tied_to_nothing_live_is_frozen(batch: list[tuple[int, int]]) -> None:
    store, naive = LabelStore(), Naive(LABELS)
    store.fresh(LABELS)
    store.tie(np.array([a for a, _ in batch], np.int64), np.array([b for _, b in batch], np.int64))
    for left, right in batch:
        naive.tie(left, right)
    expected = {naive.root(max(pair)) for pair in batch if min(pair) <= 0 < max(pair)}
    assert set(store.frozen_roots()) == expected


def test_tie_broadcasts() -> None:
    store = LabelStore()
    row, column = store.fresh(3), store.fresh(1)
    store.tie(row, column)
    assert len(set(store.find(np.concatenate([row, column])).tolist())) == 1


def test_fresh_labels_grow_the_store() -> None:
    store = LabelStore()
    first = store.fresh(1000)
    store.tie(first[:1], first[1:2])
    second = store.fresh(5000)
    assert second[0] == first[-1] + 1 == 1001
    assert len(store) == 6001
    assert store.find(second).tolist() == second.tolist()
    assert store.find(first)[1] == first[0]


def test_freezing_reaches_the_whole_class_and_keeps_the_best_reason() -> None:
    store, reasons = LabelStore(), Reasons()
    a, b = store.fresh(3), store.fresh(3)
    output = reasons.label(Reason("model output"))
    store.freeze(a[:1], 0)
    store.freeze(np.concatenate([[0], b[:1]]), output)
    store.freeze(b[1:2], 0)
    store.tie(a, b)
    frozen = store.frozen_roots()
    assert {int(label): reasons[because].what for label, because in frozen.items()} == {
        int(a[0]): "model output",
        int(a[1]): "tied to an axis that holds no units (batch, space or time)",
    }


def test_mixed_classes_name_their_operators_in_order() -> None:
    store = LabelStore()
    a, b = store.fresh(2), store.fresh(2)
    norm, mean = Reason("layer_norm", "net.py:1"), Reason("mean")
    store.mix(a, norm)
    store.mix(b[:1], mean)
    store.mix(b, norm)
    store.mix(np.zeros(3, np.int64), mean)
    store.tie(a, b)
    assert {why: roots.tolist() for why, roots in store.mixed().items()} == {
        norm: a.tolist(),
        mean: [a[0]],
    }


def test_reasons_are_numbered_once() -> None:
    reasons = Reasons()
    first, second = reasons.label(Reason("x", "here")), reasons.label(Reason("x", "there"))
    assert (first, second, reasons.label(Reason("x", "here"))) == (-1, -2, -1)
    assert reasons[second] == Reason("x", "there")
    with pytest.raises(IndexError):
        reasons[-3]


def test_what_tied_two_labels_is_the_last_place_between_them() -> None:
    store = LabelStore()
    a, b, c = store.fresh(2), store.fresh(2), store.fresh(1)
    for place, (x, y) in {"add": (a, b), "sum": (a[:1], c), "mix": (b[1:], c)}.items():
        with store.at(place):
            store.tie(x, y)
    store.find(np.concatenate([a, b, c]))  # which shortens paths
    assert store.tied_by(int(a[0]), int(b[0])) == "add"
    assert store.tied_by(int(a[0]), int(c[0])) == "sum"
    assert store.tied_by(int(a[0]), int(a[1])) == "mix"
    assert store.tied_by(int(a[0]), int(store.fresh(1)[0])) is None
