"""Blocks are found by evidence; what is left after some went equals the dense network that bypasses them."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.common.outputs import tensors_of
from secateur.targets.blocks.apply import verify
from secateur.targets.blocks.graph import BlockGraph
from tests.targets.blocks.models import (
    LIBRARIES,
    PLAIN,
    ROWS,
    WIDTH,
    Chain,
    Inplace,
    Plain,
    Residual,
    Shared,
    Sharing,
    Told,
    Twice,
    make,
)

SLOW = {"efficientnet", "t5", "convnext"}
NETWORKS = [
    *PLAIN,
    *(pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LIBRARIES),
]


def traced(model: nn.Module, inputs: Any) -> BlockGraph:
    return sc.trace(model, inputs, granularity="block")


def drawn(graph: BlockGraph, seed: int) -> sc.Plan:
    """A plan that removes any blocks, at least one."""
    generator = np.random.default_rng(seed)
    keep = {group.name: generator.random(group.size) < 0.5 for group in graph.groups}
    for mask in keep.values():
        mask[generator.integers(len(mask))] = True
    first = keep[graph.groups[0].name]
    if all(mask.all() for mask in keep.values()):
        first[np.flatnonzero(first)[0]] = False
    return sc.Plan.build(graph, keep, allocator="drawn", seed=seed)


def output(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(**inputs) if isinstance(inputs, dict) else model(inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_equals_the_network_that_bypasses_them(name: str) -> None:
    model, inputs = make(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    graph = traced(model, inputs)
    assert len(graph.inputs.open) > 0
    for seed in range(3):
        plan = drawn(graph, seed)
        small = sc.apply(model, plan, graph=graph)
        proof = verify(model, small, plan, graph=graph)
        assert proof.difference <= 1e-9
        assert len(proof.sizes) == 2
        assert type(small) is type(model)
        assert sum(p.numel() for p in small.parameters()) == plan.predicted.params < plan.dense.params
        with tempfile.TemporaryDirectory() as folder:
            sc.save(small, folder)
            again = sc.load(folder, lambda: make(name)[0])
        assert all(
            torch.equal(a, b) for a, b in zip(output(small, inputs), output(again, inputs), strict=True)
        )
        assert sc.record_of(again) == sc.record_of(small)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_stages_form_one_group_and_what_changes_the_shape_is_left() -> None:
    model, inputs = make("resnet")
    graph = traced(model, inputs)
    assert [(g.name, g.size) for g in graph.groups] == [("layer*", 5)]
    assert [block.path for block in graph.all_blocks()] == [
        *("layer1.0", "layer1.1", "layer1.2"),
        *("layer2.1", "layer2.2"),
    ]
    assert [(left.group.name, left.reason) for left in graph.left] == [
        ("layer2.0", "its output does not have the shape of an input")
    ]


def test_layers_that_weigh_or_gate_are_no_residual_blocks() -> None:
    with pytest.raises(sc.NothingToPruneError, match="residual blocks that can be dropped"):
        traced(Plain().eval(), torch.randn(3, WIDTH))


def test_a_list_under_two_names_is_named() -> None:
    net = Chain()
    net.copies = net.blocks  # type: ignore[assignment]
    with pytest.raises(
        sc.NothingToPruneError, match=r"blocks\.0: the model has it under other names too: copi"
    ):
        sc.trace(net, torch.randn(2, 6), granularity="block")


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (Twice, {"blocks.0": "it is called 2 times"}),
        (Shared, {"blocks.0": "it is called 2 times"}),
    ],
)
def test_blocks_that_have_to_stay(model: type[nn.Module], reasons: dict[str, str]) -> None:
    torch.manual_seed(0)
    graph = traced(model().eval(), ROWS)
    assert {left.group.name: left.reason for left in graph.left} == reasons
    assert not {*reasons} & {block.path for block in graph.all_blocks()}


def test_blocks_that_tell_the_next_one_something_stay() -> None:
    torch.manual_seed(0)
    with pytest.raises(sc.NothingToPruneError, match=r"blocks\.1: leaving them out differs from by"):
        traced(Told().eval(), ROWS)


def test_a_block_that_writes_into_its_input_goes_too() -> None:
    torch.manual_seed(0)
    model = Chain(block=Inplace).eval()
    graph = traced(model, ROWS)
    plan = drawn(graph, 0)
    verify(model, sc.apply(model, plan, graph=graph), plan, graph=graph)


class Hidden:
    """An output in which no tensor is seen."""

    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Closed(Chain):
    def forward(self, x: Tensor) -> Any:
        return Hidden(super().forward(x))


def test_outputs_in_which_no_tensor_is_seen_prove_nothing() -> None:
    with pytest.raises(sc.NothingToPruneError, match="no tensors are seen in what the model returns"):
        traced(Closed().eval(), ROWS)


class Supervised(Chain):
    """In training mode two blocks, by their positions, have an output of their own."""

    def forward(self, x: Tensor) -> Any:
        x, found = self.stem(x), []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if self.training and k in (1, 3):
                found.append(self.head(x))
        return (self.head(x), *found) if self.training else self.head(x)


def test_what_training_mode_returns_keeps_its_parts() -> None:
    torch.manual_seed(0)
    model = Supervised().eval()
    graph = traced(model, ROWS)
    small = sc.apply(model, drawn(graph, 0), graph=graph)
    assert len(small.train()(ROWS)) == len(model.train()(ROWS)) == 3


def test_lists_that_are_read_by_constants_keep_their_length() -> None:
    model, inputs = make("indexed")
    graph = traced(model, inputs)
    assert graph.removals == {"blocks": "pass"}
    plan = sc.Plan.build(graph, {"blocks": np.array([True, False, True, True])}, allocator="hand")
    small: Any = sc.apply(model, plan, graph=graph)
    assert len(small.blocks) == 4
    assert not [*small.blocks[1].parameters()]
    assert "In place of blocks.1 stands a module" in sc.record_of(small).note


def test_numbers_of_blocks_follow() -> None:
    model, inputs = make("counted")
    graph = traced(model, inputs)
    plan = sc.Plan.build(graph, {"blocks": np.array([True, False, False, True])}, allocator="hand")
    small: Any = sc.apply(model, plan, graph=graph)
    assert (small.depth, len(small.blocks)) == (2, 2)
    assert sc.record_of(small).sizes == {"depth": 2}


def test_numbers_that_mean_something_else_stay() -> None:
    """Of two lists of equal length neither owns a number, and no attribute is an index by chance."""

    class Strided(Residual):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.stride = stride

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_layers, self.layer_idx = 2, 7
            self.a = nn.ModuleList([Strided(1), Strided(2)])
            self.b = nn.ModuleList([Strided(1), Strided(2)])

        def forward(self, x: Tensor) -> Tensor:
            for block in (*self.a, *self.b):
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Towers().eval()
    graph = traced(model, torch.randn(3, WIDTH))
    assert [(group.name, group.size) for group in graph.groups] == [("a", 2), ("b", 2)]
    plan = sc.Plan.build(graph, {"a": np.array([False, True])}, allocator="hand")
    small: Any = sc.apply(model, plan, graph=graph)
    assert (small.num_layers, small.layer_idx, small.a[0].stride) == (2, 7, 2)


def test_predicted_macs_are_those_of_the_smaller_network() -> None:
    for name in ("chain", "resnet"):
        model, inputs = make(name)
        graph = traced(model, inputs)
        plan = drawn(graph, 2)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            sc.apply(model, plan, graph=graph)(inputs)
        assert plan.predicted.macs == counter.get_total_flops() // 2 // len(inputs)


def test_a_wrong_model_is_not_verified() -> None:
    model, inputs = make("chain")
    graph = traced(model, inputs)
    plan = drawn(graph, 1)
    small: Any = sc.apply(model, plan, graph=graph)
    with torch.no_grad():
        small.blocks[0].down.bias += 1e-6
    with pytest.raises(sc.VerificationError, match="blocks bypassed to 1e-09 relative in float64, but"):
        sc.verify(model, small, plan)
    small = sc.apply(model, plan, graph=graph)
    small.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(sc.VerificationError, match="got others for extra"):
        sc.verify(model, small, plan)


def test_costs_are_those_of_the_blocks() -> None:
    model, inputs = make("chain")
    graph = traced(model, inputs)
    cost = 2 * WIDTH * 24
    assert [(each.params, each.macs) for each in graph.each["blocks"]] == [(cost + 24 + WIDTH, cost)] * 4
    keep = {"blocks": np.array([False, True, True, False])}
    assert graph.dense.macs - graph.cost(keep).macs == 2 * cost
    params, macs = graph.sweep({"blocks": np.array([1, 9, 9, 2])}, 3)
    assert (np.diff(params) == -(cost + 24 + WIDTH)).all()
    assert (np.diff(macs) == -cost).all()
    with pytest.raises(sc.PlanError, match="expected a mask for one of"):
        graph.cost({"blocks": np.ones(3, dtype=bool)})


def test_tied_parameters_are_not_counted_as_saved() -> None:
    torch.manual_seed(0)
    model: Any = Chain().eval()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    graph = traced(model, ROWS)
    plan = sc.Plan.build(graph, {"blocks": np.array([True, False, True, True])}, allocator="hand")
    small = sc.apply(model, plan, graph=graph)
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.params


def test_plans_for_other_paths_are_refused() -> None:
    model, inputs = make("chain")
    graph = traced(model, inputs)
    plan = drawn(graph, 0)
    for old, new in (("blocks.", "stem."), ("blocks.", "nothing.")):
        other = sc.Plan.from_json(plan.to_json().replace(f'"tensor": "{old}', f'"tensor": "{new}'))
        with pytest.raises(sc.PlanError, match="to be an entry of a ModuleList or Sequential of the model"):
            sc.apply(model, other)
    with pytest.raises(sc.SettingError, match=r"apply\(form='graph'\): expected one of auto, module for bl"):
        sc.apply(model, plan, "graph")


def test_limits_speak_of_single_blocks() -> None:
    model, inputs = make("chain")
    graph = traced(model, inputs)
    scores = sc.score(graph, None, "magnitude")
    for ignore in (("blocks.0", "blocks.3"), (model.get_submodule("blocks.0"), "blocks.3.down")):
        limits = sc.Limits(ignore=ignore)
        plan: Any = sc.Uniform(ratio=0.9, removal="magnitude").allocate(graph, scores, limits=limits)
        assert plan.keep["blocks"].tolist() == [True, False, False, True]
    assert plan.settings["stay"] == ["blocks.0", "blocks.3.down"]
    with pytest.raises(sc.NothingToPruneError, match="ignored"):
        sc.Uniform(ratio=0.9, removal="magnitude").allocate(
            graph, scores, limits=sc.Limits(ignore=("blocks",))
        )
    with pytest.raises(sc.SettingError, match="to match a group, got 'other'"):
        sc.Uniform(ratio=0.9, removal="magnitude").allocate(
            graph, scores, limits=sc.Limits(ignore=("other",))
        )
    plan = sc.Uniform(ratio=0.9, removal="magnitude").allocate(graph, scores)
    assert plan.groups[0].kept == 1


def test_a_number_of_the_block_itself_stays_its_own() -> None:
    """It counts up by chance: only names that speak of places do what their names say."""

    class Dropping(Residual):
        def __init__(self, drop: int) -> None:
            super().__init__()
            self.drop = drop

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.dropout(self.down(torch.relu(self.up(x))), self.drop / 10, self.training)

    torch.manual_seed(0)
    model = nn.Sequential(*(Dropping(k) for k in range(4))).eval()
    graph = traced(model, torch.randn(3, WIDTH))
    plan = sc.Plan.build(graph, {"blocks": np.array([True, False, True, True])}, allocator="hand")
    small: Any = sc.apply(model, plan, graph=graph)
    assert [block.drop for block in small] == [0, 2, 3]


def test_where_nothing_is_found_it_is_said_what_cannot_be() -> None:
    class NoGradients(Chain):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(sc.NothingToPruneError, match=r"under torch\.no_grad"):
        traced(NoGradients().eval(), ROWS)


def test_nested_blocks_are_the_innermost_equal_ones() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Residual(), Residual())

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Residual(), Residual(inner=8))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found

    torch.manual_seed(0)
    stages = traced(nn.Sequential(Stage(), Stage()).eval(), torch.randn(3, WIDTH))
    assert [b.path for b in stages.all_blocks()] == ["0.inner.0", "0.inner.1", "1.inner.0", "1.inner.1"]
    blocks = traced(nn.Sequential(Sides(), Sides()).eval(), torch.randn(3, WIDTH))
    assert [b.path for b in blocks.all_blocks()] == ["0", "1"]


class Adds(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Queries(nn.Module):
    """Blocks behind parameters that a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.read = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Adds(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.read(self.queries.expand(len(x), -1, -1)) + x
        for block in self.blocks:
            h = block(h)
        return h


def test_blocks_behind_learned_queries() -> None:
    graph = sc.trace(Queries().eval(), torch.randn(4, 5, 6), granularity="block")
    assert sum(group.size for group in graph.groups) == 3


@pytest.mark.parametrize("whole", [False, True])
def test_what_blocks_share_is_counted_until_the_last_of_them_goes(whole: bool) -> None:
    model = Sharing(whole)
    graph = traced(model, torch.randn(2, 6))
    for gone in ([0], [2], [0, 2], [0, 1, 2]):
        plan = sc.Plan.build(graph, {"blocks": ~np.isin(np.arange(4), gone)}, allocator="drawn")
        small = sc.apply(model, plan, graph=graph)
        assert sum(p.numel() for p in small.parameters()) == plan.predicted.params
