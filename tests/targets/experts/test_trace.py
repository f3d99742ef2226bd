"""Recognition by structure, and its proof."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.targets.experts.models import EXPERTS, FAMILIES, Mixture, PlainLM, make, words

ROUTERS = {"gptoss": "router", "plain": "router"}
BLOCKS = {"qwen3": 1, "deepseek": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_block_and_leaves_the_model_alone(family: str) -> None:
    model = make(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = sc.trace(model, words(), granularity="expert")
    assert len(graph.blocks) == BLOCKS.get(family, 2)
    assert graph.left == ()
    assert graph.proven
    for block in graph.blocks:
        assert block.router == f"{block.name}.{ROUTERS.get(family, 'gate')}"
        assert block.count == (6 if family == "plain" else EXPERTS)
        assert block.top_k == (3 if family == "qwen3" else 2)
        assert block.routing_groups == (2 if family == "deepseek" else 1)
        assert block.min_keep == (4 if family == "deepseek" else block.top_k)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["qwen2", "gptoss", "deepseek", "plain"])
def test_cost_counts_what_the_model_holds(family: str) -> None:
    model = make(family)
    graph = sc.trace(model, words(), granularity="expert")
    assert graph.dense.params == sum(p.numel() for p in model.parameters())
    assert graph.dense.experts == sum(b.count for b in graph.blocks)
    block = graph.blocks[0]
    one = torch.ones(block.count, dtype=torch.bool).numpy()
    one[1] = False
    cost = graph.cost({block.name: one})
    experts = [t for n, t in model.state_dict().items() if n.startswith(f"{block.experts}.")]
    router = sum(t.numel() // block.count for t in model.get_submodule(block.router).parameters())
    assert graph.dense.params - cost.params == sum(t.numel() for t in experts) // block.count + router
    assert graph.dense.macs - cost.macs == 12 * 32  # a row of the router, for each of the sample's 12 tokens


def test_macs_are_those_of_the_experts_that_tokens_use() -> None:
    graph = sc.trace(PlainLM(inner=10, experts=7, k=3).eval(), words(length=5), granularity="expert")
    block = 32 * 7 + (3 + 1) * 2 * 32 * 10  # router, three experts and the shared one
    assert graph.dense.macs == 5 * (2 * block + 32 * 64)


class _Weird(Mixture):
    """Adds something for experts that are chosen twice as often: not what excluding them gives."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.experts)


def test_a_block_that_fails_its_trial_is_left_with_the_reason() -> None:
    model = PlainLM().eval()
    model.blocks[0] = _Weird().eval()
    graph = sc.trace(model, words(), granularity="expert")
    assert [b.name for b in graph.blocks] == ["blocks.1"]
    assert graph.left[0].group.name == "blocks.0"
    assert "did not give what excluding them gives" in graph.left[0].reason


class _Fallback(Mixture):
    """Few tokens go to an expert of a fixed number."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.experts[2](x) if x.shape[-2] < 4 else super().forward(x)
        return found


class _Noisy(Mixture):
    """In training the router adds noise of a learnt size, which has an axis for the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.zeros(32, 6))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training:
            flat = x.reshape(-1, x.shape[-1])
            out = out + 0 * (self.router(flat) + flat @ self.noise).sum()
        return out


class _Counting(Mixture):
    """In training it counts the experts that were used, by an attribute of any name."""

    def __init__(self) -> None:
        super().__init__()
        self.e = 6

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training:
            scores = self.router(x.reshape(-1, x.shape[-1]))
            out = out + (nn.functional.one_hot(scores.argmax(-1), self.e) * scores).sum() * 0
        return out


@pytest.mark.parametrize(
    ("block", "reason"), [(_Fallback, "for 1 tokens"), (_Noisy, "in training mode it failed")]
)
def test_a_block_is_tried_with_few_tokens_and_in_training_mode(block: type[Mixture], reason: str) -> None:
    torch.manual_seed(0)
    model = PlainLM().eval()
    model.blocks[0] = block().eval()
    graph = sc.trace(model, words(), granularity="expert")
    assert [b.name for b in graph.blocks] == ["blocks.1"]
    assert reason in graph.left[0].reason


def test_what_only_training_reads_follows() -> None:
    torch.manual_seed(0)
    model = PlainLM().eval()
    model.blocks[0] = _Counting().eval()
    graph = sc.trace(model, words(), granularity="expert")
    plan = sc.Uniform(ratio=0.5, removal="weight_norm").allocate(
        graph, sc.score(graph, [words()], "weight_norm")
    )
    small = sc.apply(model, plan, graph=graph)
    assert len(small.blocks[0].experts) == small.blocks[0].e == 3
    small.train()(words())


def test_a_layer_list_beside_a_matrix_of_as_many_rows_is_no_mixture() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = Deep()

        def forward(self, x: Tensor) -> Tensor:
            return self.deep(x)

    with pytest.raises(sc.NothingToPruneError, match="found none"):
        sc.trace(Outer(), torch.randn(4, 5), granularity="expert")


def test_no_experts_at_all_is_refused() -> None:
    with pytest.raises(sc.NothingToPruneError, match="to hold a mixture of experts, got none"):
        sc.trace(nn.Linear(3, 3), torch.zeros(1, 3), granularity="expert")


def test_a_block_whose_tokens_use_every_expert_is_left() -> None:
    with pytest.raises(sc.NothingToPruneError, match="a token uses 3 of its 3 experts: none can go"):
        sc.trace(PlainLM(experts=3, k=3).eval(), words(), granularity="expert")


def test_a_router_in_half_precision() -> None:
    graph = sc.trace(make("mixtral").bfloat16(), words(), granularity="expert")
    assert len(graph.blocks) == 2


def test_on_the_meta_device_structure_decides() -> None:
    inputs = {"input_ids": words(), "attention_mask": torch.ones_like(words())}
    dense = sc.trace(make("qwen2"), inputs, granularity="expert")
    empty = make("qwen2").to("meta")
    empty.set_attn_implementation("eager")
    graph = sc.trace(empty, inputs, granularity="expert")
    assert not graph.proven
    assert [b.name for b in graph.blocks] == [b.name for b in dense.blocks]
    assert graph.dense == dense.dense
    assert graph.fingerprint == dense.fingerprint
