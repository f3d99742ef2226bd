"""A part of the data."""

from __future__ import annotations

import pytest
import torch

from secateur.calibration import Calibration
from secateur.calibration.subset import take_share


def data(batches: int, size: int) -> Calibration:
    values = torch.arange(batches * size).reshape(batches, size, 1).float()
    return Calibration.of([(v, v[:, 0].long()) for v in values])


@pytest.mark.parametrize(
    ("batches", "size", "share"), [(8, 100, 1 / 16), (8, 100, 0.25), (40, 10, 0.1), (3, 7, 0.5), (1, 64, 0.3)]
)
def test_about_the_share_and_always_the_same(batches: int, size: int, share: float) -> None:
    part = take_share(data(batches, size), share)
    found = [batch.size for batch in part]
    # What is owed at the end is less than what is taken at once.
    assert abs(sum(found) - max(share * batches * size, min(16, size))) < min(16, size)
    assert [b.args[0].tolist() for b in part] == [b.args[0].tolist() for b in part]
    assert all(bool((b.args[0][:, 0].long() == b.labels).all()) for b in part)


def test_it_comes_from_all_over_the_data() -> None:
    starts = [int(b.args[0][0]) // 100 for b in take_share(data(8, 100), 0.25)]
    assert starts == list(range(8))


def test_all_of_it_is_the_data_itself() -> None:
    whole = data(2, 3)
    assert take_share(whole, 1.0) is whole
    assert take_share(whole, 7.0) is whole


def test_whole_batches() -> None:
    found = [(b.size, int(b.args[0][0])) for b in take_share(data(8, 10), 0.25, whole=True)]
    assert all(size == 10 for size, _ in found)
    assert found[0][1] == 0
    assert 2 <= len(found) <= 3
