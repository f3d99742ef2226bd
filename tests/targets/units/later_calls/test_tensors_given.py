"""A tensor that the trace had not, and numbers that follow from how many units stay: right or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.targets.units.later_calls.axes import axes_of_view
from tests.targets.units.later_calls.test_switched import pruned

Way = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
WAYS: dict[str, Way] = {
    "rows of a table": lambda net, h, x, m: h * net.table[: h.shape[1], : h.shape[-1]],
    "narrowed": lambda net, h, x, m: h * net.table[0].narrow(0, 0, h.size(-1)),
    "whole weight": lambda net, h, x, m: h * net.scale[: h.shape[-1]],
    "numbered": lambda net, h, x, m: h * (torch.arange(99)[: h.shape[-1]] % 2),
    "listed": lambda net, h, x, m: h * torch.tensor([float(n) for n in range(h.shape[-1])]),
    "padded input": lambda net, h, x, m: h * F.pad(x, (0, 9))[..., : h.shape[-1]],
    "pooled input": lambda net, h, x, m: h * F.adaptive_avg_pool1d(x, h.shape[-1]),
    "summed": lambda net, h, x, m: h * x.new_ones(h.shape[-1]).cumsum(0),
    "per number": lambda net, h, x, m: h / h.shape[-1],
    "per numbers": lambda net, h, x, m: h / (h.shape[-1] * 2 + 1),
    "shifted": lambda net, h, x, m: h + (h.size(2) - 3),
    "if many": lambda net, h, x, m: h * 2 if h.shape[-1] > 7 else h,
    "if odd": lambda net, h, x, m: h * 2 if h.shape[-1] % 2 else h,
    "other numbers": lambda net, h, x, m: setattr(h, "data", h.data.flip(-1)) or h,
    "drawn": lambda net, h, x, m: h * torch.rand(h.shape[-1], generator=torch.Generator().manual_seed(0)),
    "by its values": lambda net, h, x, m: h * m[..., None] + h.flip(-1) * (1 - m[..., None]),
    "if some are out": lambda net, h, x, m: h if m.all() else h.flip(-1),
    "if few are in": lambda net, h, x, m: h.flip(-1) if m.sum().item() < m.numel() else h,
    "scaled": lambda net, h, x, m: h * m[..., None] / h.shape[1],
    "if some are out, scaled": lambda net, h, x, m: h if m.all() else h * m[..., None],
    "if long": lambda net, h, x, m: h * m[..., None] if h.shape[1] > 3 else h.flip(-1),
}
RIGHT = {"scaled", "if some are out, scaled", "if long"}


class Net(nn.Module):
    def __init__(self, way: Way, features: int) -> None:
        super().__init__()
        self.body, self.head, self.way = nn.Linear(features, 9), nn.Linear(9, 4), way
        self.register_buffer("table", torch.rand(20, 20))
        self.scale = nn.Parameter(torch.rand(9))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, length, features] and [batch, length] to [batch, length, 4]."""
        hidden = torch.relu(self.body(x))
        return self.head(hidden if mask is None else self.way(self, hidden, x, mask))


@pytest.mark.parametrize("sizes", [(2, 5, 7), (6, 5, 7), (2, 6, 7), (2, 5, 6), (6, 6, 6)])
@pytest.mark.parametrize("way", WAYS)
def test_a_mask_is_right_or_refused_though_sizes_are_equal(way: str, sizes: tuple[int, ...]) -> None:
    """Six of nine units stay, as many as samples, places or features. A mask of ones comes first."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, mask = torch.randn(sizes).double(), torch.ones(sizes[:2]).double()
        small, masked = pruned(Net(WAYS[way], sizes[2]).double().eval(), x)
    refused = []
    for given in (mask, (torch.arange(mask.numel()) % 4 > 0).double().view_as(mask), mask):
        wanted = masked(x, given)
        try:
            torch.testing.assert_close(small(x, given), wanted)
        except sc.InputError as error:
            refused.append(str(error))
    assert (not refused) == (way in RIGHT)
    assert all(len(text) < 600 for text in refused)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[batch, length, 16] to [batch, 3]."""
        hidden = self.body(x, mask=mask, src_key_padding_mask=padding)
        if padding is None:
            return self.head(hidden.mean(1))
        kept = (~padding).to(hidden.dtype)[..., None]
        return self.head((hidden * kept).sum(1) / kept.sum(1))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = (
            nn.Conv2d(3, 12, 3, 2, 1),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 12, 3, 1, 1),
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, 3, 16, 16] and [batch, 1, 16, 16] to [batch, 4]."""
        hidden = self.two(torch.relu(self.norm(self.one(x)))).relu()
        if mask is not None:
            hidden = hidden * F.interpolate(mask, size=hidden.shape[-2:])
        return self.head(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


@pytest.mark.parametrize("length", [5, 8, 16])
@pytest.mark.parametrize("traced", [{}, {"padding": True}])
def test_an_encoder_takes_masks(length: int, traced: dict[str, bool]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(2, length, 16).double()
        padding = torch.arange(length) >= torch.tensor([length, length - 2])[:, None]
        small, masked = pruned(Encoder().double().eval(), {"x": x} | ({"padding": padding} if traced else {}))
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for call in ({}, {"padding": padding}, {"mask": later}, {"padding": padding, "mask": later}):
        torch.testing.assert_close(small(x, **call), masked(x, **call))


def test_images_take_a_mask_as_large_as_units_are_many() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, mask = torch.randn(2, 3, 16, 16).double(), torch.rand(2, 1, 16, 16).double()
        small, masked = pruned(Images().double().eval(), x)
    assert len(small.one.weight) == 8  # the images have 8 rows there too
    turned = x.to(memory_format=torch.channels_last)
    for call in ((x, mask), (turned, mask), (turned.requires_grad_(), mask)):
        torch.testing.assert_close(small(*call), masked(*call))


@pytest.mark.parametrize(
    ("before", "after", "axes", "expected"),
    [
        ((2, 5, 8), (2, 5, 2, 4), {-1}, {-1, -2}),
        ((2, 5, 8), (10, 8), {-1}, {-1}),
        ((2, 5, 8), (10, 8), {-2}, {-2}),
        ((2, 3, 4), (2, 12), {-1}, {-1}),
        ((2, 3, 4), (4, 3, 2), {-1}, {-1, -2, -3}),
    ],
)
def test_a_view_spreads_units(before: Any, after: Any, axes: set[int], expected: set[int]) -> None:
    assert axes_of_view(before, after, frozenset(axes)) == expected


def test_a_view_of_nothing_may_have_units_anywhere() -> None:
    assert axes_of_view((0, 4), (4, 0), frozenset({-1})) is None
