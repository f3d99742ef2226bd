"""Which dimensions of attention heads go together, and which stay, with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from tests.targets.headsizes.models import HEADS, ROWS, SIZE, network

FREE = ["fused", "eager", "summed"]


@pytest.mark.parametrize("name", FREE)
def test_queries_with_keys_and_values_are_groups(name: str) -> None:
    graph = sc.trace(network(name), ROWS, granularity="head_size")
    assert [(group.name, group.size) for group in graph.groups] == [
        ("1.q", SIZE),
        ("1.v", SIZE),
        ("2.q", SIZE),
        ("2.v", SIZE),
    ]
    for group in (graph["1.q"], graph["1.v"]):
        for piece in group.slices:
            for unit in range(SIZE):
                wanted = [head * SIZE + unit for head in range(HEADS)]
                assert piece.position[piece.unit == unit].tolist() == wanted
    made = {piece.tensor for piece in graph["1.q"].of_role("match")}
    assert made == {piece.tensor for piece in graph["1.q"].of_role("produce")}
    assert made == {"1.q.weight", "1.q.bias", "1.k.weight", "1.k.bias"}
    assert not graph["1.q"].of_role("consume")
    assert not graph["1.v"].of_role("match")


def test_what_a_rotary_embedding_turns_together_goes_together() -> None:
    graph = sc.trace(network("rotary"), ROWS, granularity="head_size")
    assert graph["1.q"].size == SIZE // 2
    (weight,) = (p for p in graph["1.q"].of_role("produce") if p.tensor == "1.q.weight")
    assert weight.position[weight.unit == 1].tolist()[:4] == [
        1,
        1 + SIZE // 2,
        SIZE + 1,
        SIZE + 1 + SIZE // 2,
    ]
    assert [(p.tensor, p.position.tolist()) for p in graph["1.q"].of_role("scale")] == [
        ("1.frequency", [0, 1, 2])
    ]


def test_heads_that_share_keys_lose_the_same_dimensions() -> None:
    graph = sc.trace(network("grouped"), ROWS, granularity="head_size")
    assert [(group.name, group.size) for group in graph.groups][:2] == [("1.q", SIZE), ("1.v", SIZE)]
    (key,) = (p for p in graph["1.q"].of_role("produce") if p.tensor == "1.k.weight")
    assert len(key.position) == 2 * SIZE


def test_a_norm_over_a_head_keeps_its_queries() -> None:
    graph = sc.trace(network("normed"), ROWS, granularity="head_size")
    assert [group.name for group in graph.groups] == ["1.v", "2.v"]
    (left,) = (left for left in graph.left if left.group.name == "1.q")
    assert left.reason.startswith("mixed by aten.mean.dim")


def test_features_that_zero_does_not_silence_stay() -> None:
    graph = sc.trace(network("kernel"), ROWS, granularity="head_size")
    assert [group.name for group in graph.groups] == ["1.v", "2.v"]
    (left,) = (left for left in graph.left if left.group.name == "1.q")
    assert "sums products of activations that zeros in the weights of a unit do not silence" in left.reason


def test_with_units_all_but_whole_heads() -> None:
    model = nn.Sequential(network("eager"), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    names = [g.name for g in sc.trace(model, ROWS, granularity=["unit", "head_size"]).groups]  # type: ignore[call-overload]
    assert {"0.1.q", "0.1.v", "1"} <= set(names)
    assert "1" not in [g.name for g in sc.trace(model, ROWS, granularity="head_size").groups]


@pytest.mark.parametrize("name", FREE)
def test_the_default_is_whole_heads_as_before(name: str) -> None:
    graph = sc.trace(network(name), ROWS)
    sizes = {group.name: group.size for group in graph.groups}
    assert sizes["1.q"] == HEADS
    assert not graph.head_sizes
    assert not any(piece.role == "match" for group in graph.groups for piece in group.slices)


def test_without_attention_there_is_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(sc.NothingToPruneError, match="expected an attention whose heads can lose"):
        sc.trace(model, torch.ones(2, 4), granularity="head_size")
