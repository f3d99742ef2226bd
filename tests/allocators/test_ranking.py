from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocators.ranking import ascending, ranks
from tests.allocators.fake import reference_order

scores = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), max_size=12).map(np.array)


def test_the_lowest_index_of_a_tie_goes_last() -> None:
    assert ascending(np.array([1.0, 0.0, 1.0, 1.0])).tolist() == [1, 3, 2, 0]
    assert ascending(np.zeros(4)).tolist() == [3, 2, 1, 0]


def test_nothing_to_rank() -> None:
    assert ascending(np.empty(0)).tolist() == []
    assert ranks(np.empty(0)).tolist() == []


@given(scores)
def test_the_order_is_the_reference(values: np.ndarray) -> None:
    assert ascending(values).tolist() == reference_order(values)


@given(scores)
def test_ranks_invert_the_order(values: np.ndarray) -> None:
    assert ranks(values)[ascending(values)].tolist() == list(range(len(values)))
