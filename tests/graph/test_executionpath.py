"""Branches of a forward pass on sizes and on training mode: what a capture at one size does not see."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.executionpath import ExecutionPath
from tests.targets.units.plans import random_plan


class Net(nn.Module):
    """Linear layers with a branch of the user's between them."""

    def __init__(self, branch: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 16)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """[batch, steps, 6] to [batch, steps, 3]."""
        h = self.branch(self, x, self.a(x).relu())
        return self.o(self.b(h).relu()).view(len(x), -1, 3)


def training_slices(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return torch.cat([h[..., :8] * 2, h[..., 8:]], -1) if net.training else h


def training_literal(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.reshape(-1, 16) * 1.5 if net.training else h


def training_mean(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True) if net.training else h


def training_size(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h * (torch.arange(h.shape[-1]) < (8 if net.training else 16))


def long_mean(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True) if x.shape[1] > 7 else h


def long_literal(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.reshape(-1, 16) if x.size(1) > 7 else h


def long_by_half(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    half = h.shape[1] // 2
    return h.flip(-1) if half >= 4 else h


def short_literal(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h if h.shape[-2] >= 3 else h.view(-1, 16)


def one_sample(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.view(1, -1, 16).flip(-1) if len(x) == 1 else h


def odd(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h if x.shape[1] % 2 else h.view(-1, 16)


def number_only(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.roll(1 if x.shape[1] > 7 else 0, -1)


def nested(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    if x.shape[1] > 6:
        if x.shape[1] > 8:
            return h.flip(-1)
    return h


def residue(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x.shape[1] % 4 == 0 else h


def both_axes(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x.shape[0] > 2 and x.shape[1] > 7 else h


def by_numel(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x[0, :, 0].numel() > 7 else h


def shorter_by_two(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x[:, 2:].shape[1] >= 6 else h


def by_len(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if len(x[0]) > 7 else h


def by_padding(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if -x.shape[1] % 4 == 2 else h


def grouped(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    k = 4 if x.shape[1] > 7 else 2
    return h.unflatten(-1, (16 // k, k)).softmax(-1).flatten(2)


def by_table(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    k = (2, 4, 8)[x.shape[1] % 3]
    return h.unflatten(-1, (16 // k, k)).softmax(-1).flatten(2)


def by_table_of_samples(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    """Three and four are also numbers of samples, which `len` returns."""
    k = (3, 4)[x.shape[1] % 3 == 0]
    return torch.cat([h[..., :12].unflatten(-1, (12 // k, k)).softmax(-1).flatten(2), h[..., 12:]], -1)


def by_bucket(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    ways = {0: lambda h: h, 1: lambda h: h.flip(-1)}
    return ways[x.shape[1] // 8](h)


def many_samples(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x.shape[0] % 8 == 0 else h


def square(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if math.sqrt(x.shape[1]) == 3 else h


def by_set(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x.shape[1] in {7, 11} else h


def training_long(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if net.training and x.shape[1] > 7 else h


def long_training(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x.shape[1] > 7 and net.training else h


def by_int(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if int(x.shape[1]) / 2 > 4.5 else h


def by_rounding(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if round(x.shape[1] / 3) == 6 else h


def by_bits(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x.shape[1] & 7 == 6 or x.shape[1] >> 4 == 2 else h


def by_quotient(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if divmod(x.shape[1], 11) == (2, 3) else h


def by_distance(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if abs(x.shape[1] - 40) < 3 else h


def by_square(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x.shape[1] ** 2 > 900 else h


def by_root(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if int(math.sqrt(x.shape[1])) > 5 else h


def by_float(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if float(x.shape[1]) > 30.5 else h


def by_text(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if f"{x.shape[1]}" == str(32) else h


def by_array(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if np.array(x.shape[1]) > 30 else h


def by_tensor(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if torch.tensor(x.shape[1]) > 30 else h


def by_range(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if len(range(x.shape[1])) > 30 else h


def by_list(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if len([0] * x.shape[1]) > 30 else h


def by_later_pieces(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    first, *rest = h.split(32, 1)
    return torch.cat([first, *(piece.flip(-1) for piece in rest)], 1)


def far_away(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if x.shape[1] > 700 else h


def beside_bounds_that_no_size_passes(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    n = x.shape[1]
    return h.flip(-1) if n > -1 and n < math.inf and n > 30 else h


def by_pieces(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(-1) if len(x.split(4, 1)) > 2 else h


def fewer_layers(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    for layer, least in zip((net.c, net.d), (2, 4), strict=True):
        if x.shape[1] >= least:
            h = layer(h)
    return h


UNWATCHED = {
    by_rounding: 18, by_bits: 38, by_quotient: 25, by_distance: 39, by_square: 31, by_root: 36, by_float: 31,
    by_text: 32, by_array: 31, by_tensor: 31, by_range: 31, by_list: 31, by_later_pieces: 33, far_away: 701,
    beside_bounds_that_no_size_passes: 31,
}  # fmt: skip
"""Branches on numbers that follow from a size and are no plain part of it, and a size on their other side."""

BRANCHES = [
    many_samples, square, training_long, long_training, by_set,
    by_int, by_pieces, fewer_layers,
    by_table, by_table_of_samples, by_bucket,
    by_len, by_padding, grouped,
    number_only, nested, residue, both_axes, by_numel, shorter_by_two,
    training_slices, training_literal, training_mean, training_size, long_mean, long_literal, long_by_half,
    short_literal, one_sample, odd,
]  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.__name__)
def test_the_pruned_model_is_right_on_both_sides_of_a_branch(
    branch: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "secateur")  # a capture that fails is named
    torch.manual_seed(0)
    model, x = Net(branch).double().eval(), torch.randn(2, 5, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.5, 0)
    small, masked = sc.apply(model, plan, "module", graph=graph), sc.apply(model, plan, "masked")
    assert sc.verify(model, small, plan).difference <= 1e-9
    for training in (False, True):
        for shape in ((2, 5), (3, 9), (1, 5), (2, 2), (2, 3), (2, 8), (2, 12), (1, 1), (8, 5), (2, 11)):
            x = torch.randn(*shape, 6).double()
            try:
                torch.testing.assert_close(small.train(training)(x), masked.train(training)(x))
            except sc.InputError as error:
                at = f"{graph.inputs.open}, {graph.inputs.other_path_sizes()}"
                raise sc.InputError(f"{shape}: {error} Captured at {at}. {caplog.text}") from error


@pytest.mark.parametrize("branch", UNWATCHED, ids=lambda branch: branch.__name__)
def test_branches_on_all_kinds_of_numbers_that_follow_from_a_size_are_seen(
    branch: Callable[..., Tensor],
) -> None:
    torch.manual_seed(0)
    model, x = Net(branch).double().eval(), torch.randn(2, 5, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.5, 0)
    small, masked = sc.apply(model, plan, graph=graph), sc.apply(model, plan, "masked")
    for steps in (5, 4, 9, UNWATCHED[branch] - 1, UNWATCHED[branch]):
        x = torch.randn(2, steps, 6).double()
        torch.testing.assert_close(small(x), masked(x))


def test_a_way_for_one_sample_is_seen_where_it_was_traced() -> None:
    model, x = Net(one_sample).double().eval(), torch.randn(1, 5, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.5, 0)
    small, masked = sc.apply(model, plan, "module", graph=graph), sc.apply(model, plan, "masked")
    for samples in (1, 2):
        given = torch.cat([x] * samples)
        torch.testing.assert_close(small(given), masked(given))


def test_training_is_looked_at_where_it_was_traced_too() -> None:
    """Half as long, and shorter than seven, both modes are the same."""

    def long_training(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        return h.flip(-1) if net.training and x.shape[1] > 6 else h

    torch.manual_seed(0)
    model, x = Net(long_training).double().eval(), torch.randn(2, 8, 6).double()
    graph = sc.trace(model, x)
    assert graph.inputs.training
    plan = random_plan(graph, 0.5, 0)
    small, masked = sc.apply(model, plan, graph=graph), sc.apply(model, plan, "masked")
    torch.testing.assert_close(small.train()(x), masked.train()(x))


def test_one_line_that_serves_two_axes_is_looked_at_for_both() -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)

        def roll(self, h: Tensor, size: int, shift: int) -> Tensor:
            return h.roll(shift, 1) if size > 9 else h

        def forward(self, x: Tensor) -> Tensor:
            h = self.roll(self.roll(self.a(x), x.shape[2], 0), x.shape[3], 1)
            return self.b(h)

    with pytest.raises(sc.NothingToPruneError):  # wide pictures tie all units
        sc.trace(Rolled().eval(), torch.randn(2, 3, 8, 8))


def test_a_branch_that_the_output_does_not_show_yet_is_seen() -> None:
    """The gate is zero before training, so both lengths give equal outputs."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gate = nn.Linear(6, 12), nn.Linear(12, 6), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu().roll((0, 1)[x.shape[1] % 2], -1)
            return x + self.gate * self.b(h)

    with pytest.raises(sc.NothingToPruneError):  # odd lengths tie all units
        sc.trace(Gated().eval(), torch.randn(2, 8, 6))


def test_what_mixes_units_in_one_branch_leaves_them_whole() -> None:
    """`h - h.mean(-1)`, whether only training or only long inputs run it."""
    for branch in (training_mean, long_mean):
        graph = sc.trace(Net(branch).eval(), torch.randn(2, 5, 6))
        assert [group.name for group in graph.groups] == ["b"]


def test_sizes_on_the_other_side_of_a_comparison_are_tried() -> None:
    graph = sc.trace(Net(long_literal).eval(), torch.randn(2, 5, 6))
    steps = next(axis for axis in graph.inputs.open if not axis.batch)
    assert steps.further == (8,)
    assert "5, 2 and 8 tried" in graph.inputs.sentence()
    assert not sc.trace(Net(lambda net, x, h: h).eval(), torch.randn(2, 5, 6)).inputs.training
    assert sc.trace(Net(training_size).eval(), torch.randn(2, 5, 6)).inputs.training


def test_a_path_has_calls_with_the_users_lines_and_comparisons() -> None:
    model, x = Net(long_literal).eval(), torch.randn(2, 9, 6)
    with ExecutionPath(nn.Module()) as path:
        model(x)
    assert {"", "relu", "reshape", "view"} == {call[0] for call, _ in path.calls}
    assert {call[1][0] for call, _ in path.calls} == {__file__}
    assert [(9, 7, 0, True)] in path.compared.values()
