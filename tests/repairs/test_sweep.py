"""Refitting whole networks: exact where that is possible, alike in all forms, and never garbage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.repairs import pairs
from secateur.repairs.sweep import FACTORS
from secateur.stream import pending
from secateur.targets.units.tensors import removed_positions
from tests.helpers.models import build
from tests.repairs.nets import distance, inputs, pruned, swept, topology, topology_data


def redundant() -> nn.Sequential:
    """Of the first layer's eight linear outputs the last three are sums of the others."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ).double()
    with torch.no_grad():
        mix = torch.randn(3, 5, dtype=torch.float64)
        for tensor in (net[0].weight, net[0].bias):
            tensor[5:] = torch.tensordot(mix, tensor[:5], 1)
    return net


@pytest.mark.parametrize("form", ["module", "graph", "masked"])
def test_what_the_others_can_replace_is_replaced_exactly(form: str) -> None:
    net = redundant()
    data = inputs(3, 9, 9)
    graph, small = pruned(net, data[0][0], {"0": [5, 6, 7]}, form)
    assert distance(small, net, data) > 0.01
    repaired, report = swept("reconstruct", net, graph, small, data)
    assert distance(repaired, net, inputs(3, 9, 9, seed=1)) < 1e-12
    assert set(report) >= {"1.weight"}
    assert report["1.weight"]["after"] < 1e-10 < report["1.weight"]["before"]


def literal_columns(x: Tensor, kernel: int, stride: int, padding: int) -> np.ndarray:
    return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2).flatten(0, 1).numpy()


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_one_layer_is_the_ridge_solution_of_numpy(stride: int, padding: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, stride, padding)).double()
    data = inputs(3, 8, 8)
    graph, small = pruned(net, data[0][0], {"0": [1, 4, 6]})
    repaired, report = swept("reconstruct", net, graph, small, data)
    damping = report["2.weight"]["damping"]
    x = torch.cat([batch[0] for batch in data])
    with torch.no_grad():
        columns = literal_columns(small[1](small[0](x)), 3, stride, padding)
        wanted = net(x).movedim(1, -1).flatten(0, 2).numpy()
    a, b = columns - columns.mean(0), wanted - wanted.mean(0)
    start = small[2].weight.detach().flatten(1).numpy().T
    ridge = np.sqrt(damping * (a**2).sum(0).mean())
    weight = np.linalg.lstsq(
        np.vstack([a, ridge * np.eye(a.shape[1])]), np.vstack([b, ridge * start]), rcond=None
    )[0]
    got = repaired[2].weight.detach().flatten(1).numpy().T
    np.testing.assert_allclose(got, weight, rtol=1e-6, atol=1e-8)
    bias = wanted.mean(0) - columns.mean(0) @ weight
    np.testing.assert_allclose(repaired[2].bias.detach().numpy(), bias, rtol=1e-6, atol=1e-8)


NAMES = [
    "concat", "conv1d", "conv3d", "dict_output", "functional", "gated", "grouped_transposed", "gru",
    "multi_input", "padded_shortcut", "split_select", "stack_unbind_roll",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_topology_comes_nearer_to_the_dense_outputs(name: str) -> None:
    net, graph, small = topology(name, "graph")
    data = topology_data(name)
    repaired, report = swept("reconstruct", net, graph, small, data)
    assert report
    assert distance(repaired, net, data) < 0.5 * distance(small, net, data)
    assert all(np.isfinite(v) for entry in report.values() for v in entry.values() if v is not None)


FORMS = [
    *(("reconstruct", name) for name in ("plain", "residual", "grouped", "unet", "flatten_to_linear")),
    *(("reconstruct", name) for name in ("separable", "tied_linear", "shared_input")),
    ("variance", "grouped"),
    ("channelwise", "unet"),
    ("layerwise", "unet"),
    ("bias", "residual"),
]


@pytest.mark.parametrize(("method", "name"), FORMS)
def test_all_forms_are_repaired_alike_and_masks_stay(method: str, name: str) -> None:
    data = topology_data(name, batches=2)
    made = {}
    for form in ("graph", "module", "masked"):
        net, graph, small = topology(name, form)
        made[form] = swept(method, net, graph, small, data)[0]
    plan = sc.record_of(made["masked"]).plan
    outputs = {form: sc.evaluate(m, data, dense=net).loss for form, m in made.items()}
    assert outputs["module"] == pytest.approx(outputs["graph"], rel=1e-3, abs=1e-12)
    assert outputs["masked"] == pytest.approx(outputs["graph"], rel=1e-3, abs=1e-12)
    state = made["module"].state_dict()
    for key, tensor in made["graph"].state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-3, atol=1e-4)
    for tensor_name, axes in removed_positions(plan, consumed_only=True).items():
        tensor = made["masked"].state_dict()[tensor_name]
        for axis, positions in axes.items():
            assert (tensor.index_select(axis, torch.as_tensor(positions)) == 0).all()


def test_zeros_of_an_unstructured_mask_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = inputs(6)
    graph, small = pruned(net, data[0][0], {}, "masked")
    with torch.no_grad():
        masks = {k: torch.rand(small[k].weight.shape) > 0.5 for k in (0, 2, 4)}
        for k, mask in masks.items():
            small[k].weight.mul_(mask)
    repaired, _ = swept("reconstruct", net, graph, small, data)
    for k, mask in masks.items():
        assert (repaired[k].weight[~mask] == 0).all()
    assert not torch.equal(repaired[4].weight, small[4].weight)
    assert distance(repaired, net, data) < 0.3 * distance(small, net, data)


class Block(nn.Module):
    """x + f(x) twice, with the addition behind a batch norm, a learnt scale, or bare."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.inner = nn.ModuleList([nn.Conv2d(6, 10, 3, padding=1) for _ in range(2)])
        self.outer = nn.ModuleList([nn.Conv2d(10, 6, 3, padding=1, bias=kind != "norm") for _ in range(2)])
        self.norm = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(2)])
        self.scale = nn.Parameter(torch.rand(2, 6, 1, 1) + 0.5)
        for norm in self.norm:
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
        self.gains = nn.ParameterList([torch.rand(6, 1, 1) + 0.5 for _ in range(2)])
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k in range(2):
            y = self.outer[k](torch.sin(self.inner[k](x)))
            if self.kind == "norm":
                y = self.norm[k](y)
            elif self.kind == "scale":
                y = F.dropout(y, 0.5, self.training) * self.gains[k]
            x = x + y if self.kind != "in place" else x.add_(y)
        return x


@pytest.mark.parametrize("kind", ["bare", "norm", "scale", "in place"])
def test_a_sum_is_set_right_although_its_other_operand_is_damaged(kind: str) -> None:
    """With a target that ignores the drift, the second sum would keep all of the first one's error."""
    torch.manual_seed(1)
    net = Block(kind).double().eval()
    x = inputs(3, 4, 4, batches=4, samples=2)
    graph, small = pruned(net, x[0][0], {"inner.0": [0, 1, 2, 3, 4, 5, 6, 7]})
    # 32 samples of 4 x 4 positions against 91 unknowns: the second layer can absorb much of any drift.
    repaired, _ = swept("reconstruct", net, graph, small, x)
    with torch.no_grad():
        clean = torch.cat([net(b[0]) for b in x])
        ours = torch.cat([repaired(b[0]) for b in x])
        first_only = torch.cat([_without_second(net, repaired, b[0]) for b in x])
    assert (ours - clean).square().sum() < 0.8 * (first_only - clean).square().sum()


def _without_second(net: nn.Module, repaired: nn.Module, x: Tensor) -> Tensor:
    """The repaired network, had its second block given exactly what the dense one's gives."""
    seen: dict[str, Tensor] = {}
    handle = repaired.inner[1].register_forward_pre_hook(lambda m, i: seen.update(ours=i[0].clone()))
    repaired(x)
    handle.remove()
    handle = net.inner[1].register_forward_pre_hook(lambda m, i: seen.update(theirs=i[0].clone()))
    clean = net(x)
    handle.remove()
    return clean - seen["theirs"] + seen["ours"]


def test_a_norm_takes_the_bias_that_a_layer_lacks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)
    )
    net = net.double().eval()
    data = inputs(3, 8, 8)
    graph, small = pruned(net, data[0][0], {"0": [1, 4, 6]})
    repaired, _ = swept("bias", net, graph, small, data)
    x = torch.cat([batch[0] for batch in data])
    with torch.no_grad():
        wanted, got = net[:4](x).mean((0, 2, 3)), repaired[:4](x).mean((0, 2, 3))
    torch.testing.assert_close(got, wanted)
    assert torch.equal(repaired[2].weight, small[2].weight)
    assert not torch.equal(repaired[3].running_mean, small[3].running_mean)


def test_moments_of_every_output_are_the_dense_ones() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.Sigmoid(), nn.Linear(9, 4)).double()
    data = inputs(5, samples=64)
    graph, small = pruned(net, data[0][0], {"0": [2, 3]})
    x = torch.cat([batch[0] for batch in data])
    with torch.no_grad():
        wanted, before = net(x), small(x)
        for method in ("bias", "variance", "channelwise", "layerwise"):
            repaired, _ = swept(method, net, graph, small, data)
            got = repaired(x)
            torch.testing.assert_close(got.mean(0), wanted.mean(0))
            gain = got.std(0) / before.std(0)
            ratio = wanted.std(0) / before.std(0)
            r = torch.stack(
                [torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(before.T, wanted.T, strict=True)]
            )
            expected = {
                "bias": torch.ones(4).double(),
                "variance": 1 + r.clamp_min(0) ** 2 * (ratio - 1),
                "channelwise": ratio,
                "layerwise": (wanted.var(0).sum() / before.var(0).sum()).sqrt().expand(4),
            }
            torch.testing.assert_close(gain, expected[method])


@pytest.mark.parametrize("name", ["residual", "tied_linear", "lstm", "split_select", "shared_input"])
@pytest.mark.parametrize("room", [True, False])
def test_batches_that_do_not_fit_go_to_files_or_are_run_again_with_the_same_result(
    name: str, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = topology_data(name)
    net, graph, small = topology(name, "graph" if name == "split_select" else "module")
    wanted = swept("reconstruct", net, graph, small, data)[0].state_dict()
    starts: list[int] = []
    start = pairs.Pair.start

    def counted(pair: Any, batch: Any) -> Any:
        starts.append(batch.index)
        return start(pair, batch)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pairs.Pair, "start", counted)
    if not room:
        monkeypatch.setattr(pending._ValuesFile, "write", full)
    for limit in (0, 60_000):
        starts.clear()
        monkeypatch.setattr(pending, "HELD_BYTES", limit)
        got = swept("reconstruct", net, graph, small, data)[0].state_dict()
        for key, tensor in wanted.items():
            assert torch.equal(got[key], tensor), key
        assert len(starts) == len(data) if room else len(starts) > len(data) or limit


def test_what_is_held_stays_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.repairs.pairs import Pairs

    data = topology_data("residual", batches=6)
    _, graph, small = topology("residual", "module")
    pairs = Pairs(graph, small)
    for limit in (0, 50_000, 1 << 30):
        monkeypatch.setattr(pending, "HELD_BYTES", limit)
        with pending.PendingBatches(pairs.of, graph.device, sc.Calibration.of(data)) as walk:
            for position in range(0, len(pairs.first.nodes), 3):
                assert [k for k, _, _ in walk.visit(lambda pair, p=position: p)] == list(range(6))
                assert walk.bytes() <= limit
            assert walk.bytes() > 50_000 or limit < 1 << 30


def test_the_same_data_give_the_same_tensors_and_the_inputs_are_left_alone() -> None:
    data = topology_data("residual")
    net, graph, small = topology("residual", "module")
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (net, small)]
    first, second = (swept("reconstruct", net, graph, small, data)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    for state, model in zip(before, (net, small), strict=True):
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_fewer_samples_than_columns_and_dead_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    few = inputs(6, batches=4, samples=2)
    graph, small = pruned(net, few[0][0])
    test = inputs(6, batches=1, samples=500, seed=9)
    for method in ("reconstruct", *FACTORS):
        repaired, _ = swept(method, net, graph, small, few)
        assert distance(repaired, net, test) < 1.5 * distance(small, net, test), method
    with torch.no_grad():
        net[0].bias.fill_(-1e3)  # everything behind the first activation is zero
    graph, small = pruned(net, few[0][0])
    for method in ("reconstruct", *FACTORS):
        repaired, _ = swept(method, net, graph, small, few)
        assert all(torch.isfinite(v).all() for v in repaired.state_dict().values())
        assert distance(repaired, net, test) <= distance(small, net, test) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions_are_fitted_in_float64_and_written_back(dtype: torch.dtype) -> None:
    net = redundant().to(dtype)
    data = [(x.to(dtype),) for (x,) in inputs(3, 9, 9)]
    graph, small = pruned(net, data[0][0], {"0": [5, 6, 7]})
    repaired, _ = swept("reconstruct", net, graph, small, data)
    assert {t.dtype for t in repaired.state_dict().values()} == {dtype}
    eps = torch.finfo(dtype).eps
    assert distance(repaired, net, data) < max(1e-9, 40 * eps**2) < distance(small, net, data)


def test_a_consumer_of_two_groups_and_values_that_are_not_finite() -> None:
    net, graph, small = topology("unet", "module")
    shared = [p.tensor for g in sc.record_of(small).plan.groups for p in g.slices if p.role == "consume"]
    assert any(shared.count(name) > 1 for name in shared)
    data: Any = topology_data("unet")
    _, report = swept("reconstruct", net, graph, small, data)
    assert set(shared) & set(report)
    net = build("unet")
    with torch.no_grad():
        net.down1[0].weight[0] = float("inf")
    graph = sc.trace(net, data[0][0])
    small = sc.apply(net, sc.record_of(small).plan, graph=graph)
    _, report = swept("reconstruct", net, graph, small, data)
    assert set(report) < set(shared) | {"out.weight"}


def test_nothing_removed_is_nothing_to_do() -> None:
    net = build("residual")
    data = topology_data("residual")
    graph, small = pruned(net, data[0][0], {})
    for method in ("reconstruct", *FACTORS):
        _, report = swept(method, net, graph, small, data)
        assert report == {}
