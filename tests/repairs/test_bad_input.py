"""Repair where the data or the network give little to go by: it does less, or says what is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.repairs.methods import REPAIRS
from secateur.targets.units.apply import Applier
from tests.helpers.models import TOPOLOGIES, build
from tests.repairs.nets import Data, distance, inputs, pruned, topology, topology_data
from tests.targets.units.plans import random_plan

FORMS = ("module", "graph", "masked")
QUICK = ("reconstruct", "variance", "auto")
METHODS = [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in (*REPAIRS, "auto")]


def wide() -> nn.Module:
    """64 hidden channels and 96 hidden neurons, more than there will be values to see them by."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 5),
    )  # fmt: skip


def linear() -> nn.Module:
    """No map gives more values than there are samples."""
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 4))


class Dead(nn.Module):
    """Two branches, one of which never gives anything but zeros, alone and joined with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.silent, self.loud = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.alone, self.joined = nn.Conv2d(8, 6, 1), nn.Conv2d(16, 6, 1)
        self.head = nn.Linear(6, 4)
        nn.init.constant_(self.silent.bias, -1e3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, h, w] to [batch, 4]."""
        nothing = torch.relu(self.norm(torch.relu(self.silent(x))))
        both = torch.cat([nothing, torch.relu(self.loud(x))], 1)
        return self.head(torch.relu(self.alone(nothing) + self.joined(both)).mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "wide": (wide, (3, 4, 4)),
    "linear": (linear, (8,)),
    "dead": (Dead, (3, 6, 6)),
    "residual": (lambda: build("residual"), (3, 8, 8)),
}


def halved(
    name: str, form: str = "module", dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, sc.Graph, nn.Module]:
    """A network, its trace, and what is left without half of the units of each group."""
    return _halved(name, form, dtype)


@functools.cache  # which takes `f(x)` and `f(x, default)` for two calls
def _halved(name: str, form: str, dtype: torch.dtype) -> tuple[nn.Module, sc.Graph, nn.Module]:
    net, graph, apply = _traced(name, dtype)
    return net, graph, apply(random_plan(graph, 0.5), form)  # type: ignore[arg-type]


@functools.cache
def _traced(name: str, dtype: torch.dtype) -> tuple[nn.Module, sc.Graph, Applier]:
    make, shape = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().to(dtype).eval()
    graph = sc.trace(net, torch.zeros(2, *shape, dtype=dtype))
    return net, graph, Applier(net, graph)


def data_of(name: str, **settings: int) -> Data:
    return inputs(*NETS[name][1], **settings)


def assert_sound(repaired: nn.Module, small: nn.Module) -> None:
    """Every value is a number, and what was kept measured better than what came before."""
    for name, tensor in repaired.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.dtype == small.state_dict()[name].dtype, name
    for tried in sc.record_of(repaired).repairs:
        assert not tried["kept"] or tried["after"] < tried["before"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 3, 8, 20])
def test_fewer_images_than_channels(count: int, method: str) -> None:
    net, graph, small = halved("wide")
    few, fresh = data_of("wide", batches=1, samples=count), data_of("wide", seed=1)
    repaired = sc.repair(small, net, few, method, graph=graph, progress=False)
    assert_sound(repaired, small)
    ours, theirs = (distance(m, net, fresh) for m in (repaired, small))
    assert ours <= 1.05 * theirs
    if count == 20 and method in ("reconstruct", "auto"):
        assert ours < 0.4 * theirs


@pytest.mark.parametrize("method", METHODS)
def test_fewer_rows_than_columns(method: str) -> None:
    net, graph, small = halved("linear")
    few, fresh = data_of("linear", batches=1, samples=12), data_of("linear", samples=64, seed=1)
    repaired = sc.repair(small, net, few, method, graph=graph, progress=False)
    assert_sound(repaired, small)
    assert distance(repaired, net, fresh) <= 1.05 * distance(small, net, fresh)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_dead_layer(method: str, form: str) -> None:
    (net, graph, small), data = halved("dead", form), data_of("dead", batches=5)
    assert {"silent", "loud"} <= {g.name for g in graph.groups}
    repaired = sc.repair(small, net, data, method, graph=graph, progress=False)
    assert_sound(repaired, small)
    ours, theirs = (distance(m, net, data_of("dead", seed=1)) for m in (repaired, small))
    assert ours <= theirs
    if method != "batchnorm":
        assert ours < 0.1 * theirs


@pytest.mark.parametrize("method", METHODS)
def test_images_that_are_all_alike(method: str) -> None:
    net, graph, small = halved("wide")
    ((one,),) = data_of("wide", batches=1, samples=1)
    data = [(one.expand(8, -1, -1, -1).clone(),) for _ in range(5)]
    repaired = sc.repair(small, net, data, method, graph=graph, progress=False)
    assert_sound(repaired, small)
    assert distance(repaired, net, data) <= distance(small, net, data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["concat", "shared_input"])
def test_a_consumer_of_two_groups(name: str, method: str, form: str) -> None:
    net, graph, small = topology(name, form)
    data = topology_data(name, 5, 32)
    repaired = sc.repair(small, net, data, method, graph=graph, progress=False)
    assert_sound(repaired, small)
    fresh = topology_data(name, 9, 32)[5:]
    ours, theirs = (distance(m, net, fresh) for m in (repaired, small))
    assert ours <= 1.01 * theirs
    if method != "batchnorm":
        assert ours < 0.1 * theirs


def test_a_consumer_of_two_groups_is_refitted_to_both() -> None:
    """Every column of the layer that reads both through a concatenation is set anew."""
    net = build("concat")
    torch.manual_seed(0)
    example = TOPOLOGIES["concat"].inputs(2, torch.float64)
    graph, small = pruned(net, example, {"stem": (0, 1), "layers.0": (1,)})
    data = topology_data("concat", 5, 16)
    repaired = sc.repair(small, net, data, "reconstruct", graph=graph, progress=False)
    moved = (repaired.layers[1].weight - small.layers[1].weight).abs().amax((0, 2, 3))
    assert moved.shape == (7,)
    assert (moved > 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, method: str, form: str) -> None:
    net, graph, small = halved("residual", form, dtype)
    data = [(x.to(dtype),) for (x,) in data_of("residual", batches=5)]
    repaired = sc.repair(small, net, data, method, graph=graph, progress=False)
    assert_sound(repaired, small)
    fresh = [(x.to(dtype),) for (x,) in data_of("residual", seed=1)]
    ours, theirs = (distance(m, net, fresh) for m in (repaired, small))
    assert ours < (0.7 if method == "batchnorm" else 0.1) * theirs


@pytest.mark.parametrize("method", METHODS)
def test_one_image_is_refused_by_name(method: str) -> None:
    (net, graph, small), data = halved("wide"), data_of("wide", batches=1, samples=1)
    with pytest.raises(sc.CalibrationError, match="expected at least two samples, got 1"):
        sc.repair(small, net, data, method, graph=graph, progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_no_numbers_are_refused(bad: float) -> None:
    (net, graph, small), data = halved("wide"), data_of("wide", batches=5)
    data[2][0][0, 0, 0, 0] = bad
    with pytest.raises(sc.CalibrationError, match="batch 2: expected finite inputs, got NaN or infinity"):
        sc.repair(small, net, data, "reconstruct", graph=graph, progress=False)
