from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.errors import ScoreError
from secateur.graph.groups import Group, Site, Slice
from secateur.signals.by_unit import by_entry, covered, sum_by_unit

GROUP = Group("g", 2, (), (), True)


def site(axis: int, position: list[int]) -> Site:
    return Site("n", axis, "produced", "w", np.array(position), np.zeros(len(position), dtype=np.int64))


def test_maps_and_channels_last_and_scalars() -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(by_entry(x, site(1, [0, 1, 2]), 2, (0,), GROUP), x)
    last = by_entry(x, site(3, [4, 0]), 2, (0,), GROUP)
    assert torch.equal(last, x[..., [4, 0]].permute(0, 3, 1, 2))
    assert by_entry(x[:, :, 0, 0], site(1, [0, 1, 2]), 2, (), GROUP).shape == (2, 3)


def test_samples_along_another_axis() -> None:
    x = torch.randn(5, 2, 3)  # [time, batch, units]
    expected = x.permute(1, 2, 0)
    assert torch.equal(by_entry(x, site(2, [0, 1, 2]), 2, (1,), GROUP), expected)
    assert torch.equal(by_entry(x, site(2, [0, 1, 2]), 2, (), GROUP), expected)
    square = torch.randn(2, 2, 3)  # only the captured program knows which axis is the batch
    assert torch.equal(by_entry(square, site(2, [0, 1, 2]), 2, (1,), GROUP), square.permute(1, 2, 0))
    assert torch.equal(by_entry(square, site(2, [0, 1, 2]), 2, (), GROUP), square.permute(0, 2, 1))


@pytest.mark.parametrize("dynamic", [(), (0,)])
def test_windows_folded_into_the_batch(dynamic: tuple[int, ...]) -> None:
    x = torch.randn(6, 4, 3)  # [2 samples of 3 windows, 4 positions, units]
    expected = x.reshape(2, 3, 4, 3).permute(0, 3, 1, 2)
    assert torch.equal(by_entry(x, site(2, [0, 1, 2]), 2, dynamic, GROUP), expected)


def test_no_axis_of_samples() -> None:
    with pytest.raises(ScoreError, match=r"group g: expected an axis of 4 samples at n, got shape \[3, 5\]"):
        by_entry(torch.randn(3, 5), site(1, [0]), 4, (), GROUP)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sum_by_unit_adds_in_float64(axis: int) -> None:
    x = torch.randn(4, 4, 4)
    piece = Slice("w", axis, "produce", np.array([0, 1, 3]), np.array([1, 0, 1]))
    parts = [x.select(axis, i).double().sum() for i in range(4)]
    expected = [parts[1], parts[0] + parts[3], 0.0]
    np.testing.assert_allclose(sum_by_unit(x, piece, 3), np.array([float(v) for v in expected]), rtol=1e-12)
    assert covered(piece, 3).tolist() == [True, True, False]
