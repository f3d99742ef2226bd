"""Neurons inside experts: units of the experts' inner axis, found and removed like any others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.graph.capture import capture
from secateur.graph.datasizes import measure_sizes
from tests.targets.experts.models import EXPERTS, FAMILIES, WIDTH, PlainLM, make, maker, words
from tests.targets.experts.test_apply import logits

INNER = {"mixtral": 40, "gptoss": 24, "plain": 12}
LAYERS = {"mixtral": 1, "gptoss": 1}
"""Families of which one layer shows what two do, in half of the time."""
FUSED = [f for f in FAMILIES if f != "plain"]


def with_kernel(model: nn.Module, kernel: str) -> nn.Module:
    model.set_experts_implementation(kernel)  # type: ignore[operator]
    return model


def inside(graph: sc.Graph) -> list[str]:
    """Names of the groups of neurons inside routed experts."""
    return [g.name for g in graph.groups if ".experts" in g.name]


def plan_of(graph: sc.Graph, share: float = 0.3, seed: int = 0, multiple: int = 4) -> sc.Plan:
    """Plans that a grouped product of float32 can run: its kernel reads rows of multiples of 16 bytes."""
    rng = np.random.default_rng(seed)
    keep = {}
    for name in inside(graph):
        size = graph[name].size
        keep[name] = np.ones(size, dtype=np.bool_)
        gone = multiple * max(1, round(share * size / multiple))
        keep[name][rng.choice(size, gone, replace=False)] = False
    return sc.Plan.build(graph, keep, allocator="test")


QUICK = {("qwen2", "grouped_mm"), ("mixtral", "batched_mm"), ("gptoss", "eager")}
CASES = [
    pytest.param(f, k, marks=[] if (f, k) in QUICK else pytest.mark.slow)
    for f in FUSED
    for k in ("eager", "grouped_mm", "batched_mm")
]


@pytest.mark.parametrize(("family", "kernel"), CASES)
def test_fused_experts_share_one_kept_set_and_sliced_equals_masked(family: str, kernel: str) -> None:
    model, ids = with_kernel(make(family, layers=LAYERS.get(family)), kernel), words()
    graph = sc.trace(model, ids)
    blocks = [n for n, m in model.named_modules() if n.endswith(".experts")]
    assert inside(graph) == blocks
    for name in blocks:
        group = graph[name]
        assert (group.size, group.exact) == (INNER.get(family, 16), True)
        held = {(s.tensor.rpartition(".")[2], s.role) for s in group.slices}
        assert {("gate_up_proj", "produce"), ("down_proj", "consume")} <= held
        (up,) = [s for s in group.slices if s.tensor.endswith("gate_up_proj")]
        assert np.bincount(up.unit).tolist() == [2] * group.size  # a gate and what it gates
    plan = plan_of(graph)
    for form in ("graph", "auto"):
        small = sc.apply(model, plan, form, graph=graph, example_inputs=ids)
        assert sc.verify(model, small, plan, words(3, 12, seed=1)).difference < 1e-12
        assert sum(p.numel() for p in small.parameters()) == plan.predicted.params
        assert not torch.allclose(logits(small, ids), logits(model, ids), atol=1e-3)
    assert model.config._experts_implementation == kernel
    assert small.config._experts_implementation == kernel
    assert torch.isfinite(small(input_ids=ids, labels=ids).loss)  # the trace has had no labels


def test_rows_that_a_kernel_cannot_read_are_refused_with_what_to_do() -> None:
    model, ids = with_kernel(make("qwen2"), "grouped_mm"), words()
    graph = sc.trace(model, ids)
    with pytest.raises(sc.ApplyError, match=r"multiple of 16 bytes.*Limits\(round_to=8\)"):
        sc.apply(model, plan_of(graph, multiple=1), "module", graph=graph, example_inputs=ids)


def test_equality_has_an_independent_reference() -> None:
    """Mixtral's experts in plain loops, without the removed neurons, against the sliced module."""
    model, ids = with_kernel(make("mixtral"), "eager"), words()
    graph = sc.trace(model, ids)
    plan = plan_of(graph)
    small = sc.apply(model, plan, "module", graph=graph, example_inputs=ids)
    name = "model.layers.1.mlp.experts"
    keep = torch.as_tensor(plan.keep[name])
    dense, cut = model.get_submodule(name).double(), small.get_submodule(name).double()
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(7)])
    weight = torch.rand(7, 2, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t in range(7):
        for e, w in zip(index[t], weight[t], strict=True):
            gate, up = (x[t] @ dense.gate_up_proj[e].T).chunk(2)
            inner = (torch.nn.functional.silu(gate) * up)[keep]
            expected[t] += w * (dense.down_proj[e][:, keep] @ inner)
    torch.testing.assert_close(cut(x, index, weight), expected, rtol=1e-12, atol=1e-12)


def test_macs_count_the_experts_that_tokens_use() -> None:
    model = make("mixtral")
    graph = sc.trace(model, words(2, 12))
    name = inside(graph)[0]
    keep = np.ones(40, dtype=np.bool_)
    keep[3] = False
    cost = graph.cost({name: keep})
    assert graph.cost().macs - cost.macs == 12 * 2 * 3 * WIDTH  # tokens, experts of each, matrices
    assert graph.cost().params - cost.params == EXPERTS * 3 * WIDTH


def test_a_list_of_experts_has_a_kept_set_for_each() -> None:
    model, ids = make("plain"), words()
    graph = sc.trace(model, ids)
    assert inside(graph) == [f"blocks.{b}.experts.{e}.up" for b in (0, 1) for e in range(6)]
    plan = plan_of(graph)
    for form in ("graph", "module"):
        small = sc.apply(model, plan, form, graph=graph, example_inputs=ids)
        assert sc.verify(model, small, plan, words(3, 12, seed=1)).difference < 1e-12
        assert sum(p.numel() for p in small.parameters()) == plan.predicted.params


def test_a_list_is_counted_by_the_tokens_that_each_expert_gets() -> None:
    model, ids = PlainLM(inner=10, experts=4, k=2).eval(), words(4, 16)
    graph = sc.trace(model, ids)
    with torch.no_grad():
        x = nn.functional.layer_norm(model.embed(ids), [WIDTH])
        chosen = model.blocks[0].router(x.flatten(0, 1)).topk(2, dim=-1).indices
    for expert in range(4):
        one = np.ones(10, dtype=np.bool_)
        one[0] = False
        cost = graph.cost({f"blocks.0.experts.{expert}.up": one})
        tokens = int((chosen == expert).sum())
        assert graph.cost().macs - cost.macs == pytest.approx(tokens * 2 * WIDTH / 4, abs=1)


def test_sizes_that_depend_on_the_data_stay_unknown_without_data() -> None:
    """On the meta device nothing can be run: what an unknown size reaches is frozen, and named."""
    graph = sc.trace(PlainLM().to("meta").eval(), words())
    assert inside(graph) == []
    assert any("the size depends on the data" in frozen.reason for frozen in graph.frozen)


def test_measuring_leaves_the_model_alone() -> None:
    class Counting(PlainLM):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return super().forward(input_ids)

    torch.manual_seed(0)
    model = Counting().eval()
    program, *_ = capture(model, (words(),), {})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    measure_sizes(program)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("kept", "family"), [(16, "mixtral"), pytest.param(16, "gptoss", marks=pytest.mark.slow)]
)
def test_half_precision_in_rows_that_the_kernel_reads(kept: int, family: str) -> None:
    model, ids = make(family, layers=LAYERS[family]).bfloat16(), words()
    graph = sc.trace(model, ids)
    for count in (kept, kept - 1):
        keep = {name: np.arange(graph[name].size) < count for name in inside(graph)}
        plan = sc.Plan.build(graph, keep, allocator="test")
        if count % 8 == 0:
            small = sc.apply(model, plan, graph=graph, example_inputs=ids)
            assert sc.verify(model, small, plan, ids).difference < 1e-12
        else:
            with pytest.raises(sc.ApplyError, match=r"multiple of 16 bytes .* Limits\(round_to=8\)"):
                sc.apply(model, plan, graph=graph, example_inputs=ids)


def test_experts_in_float64_that_run_in_a_loop() -> None:
    model = with_kernel(make("mixtral", layers=1), "eager").double()
    graph = sc.trace(model, words())
    plan = plan_of(graph)
    small = sc.apply(model, plan, graph=graph, example_inputs=words())
    assert sc.record_of(small).form == "module"
    assert sc.verify(model, small, plan, words(3, 12, seed=1)).difference < 1e-12
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("family", ["qwen2", "plain"])
def test_the_whole_pipeline(family: str, tmp_path: Path) -> None:
    model = make(family)
    data = [{"input_ids": part, "labels": part} for part in words(20, 16).chunk(5)]
    if family == "plain":
        data = [(part, part) for part in words(20, 16).chunk(5)]

    def loss(which: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(which(batch[0]).flatten(0, 1), batch[1].flatten())

    rule = sc.ToD(removal="magnitude", protection="taylor")
    result = sc.prune(
        model, data, sc.Budget(macs=0.8), rule, repair=None, loss_fn=loss if family == "plain" else None,
        limits=sc.Limits(round_to=4), measure_latency=False, progress=False,
    )  # fmt: skip
    assert result.report.proof["difference"] < 1e-9
    gone = {g.name: len(g.removed) for g in result.plan.groups if ".experts" in g.name}
    assert sum(gone.values()) > 0
    sc.save(result.model, tmp_path)
    loaded = sc.load(tmp_path, maker(family), example_inputs=data[0] if family == "qwen2" else data[0][0])
    assert torch.equal(logits(loaded, words(4, 16)), logits(result.model, words(4, 16)))
