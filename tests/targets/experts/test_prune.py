"""`sc.prune(granularity="expert")`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import secateur as sc
from tests.targets.experts.models import make, maker, words
from tests.targets.experts.test_apply import logits


def data() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part, "labels": part} for part in words(20, 16).chunk(5)]


@pytest.mark.parametrize("allocator", ["tod", "emp", sc.Uniform(removal="frequency*reap")])
def test_the_whole_pipeline(allocator: str | sc.ToD, tmp_path: Path) -> None:
    model = make("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = [
        sc.prune(
            model, data(), sc.Budget(experts=0.5), allocator, "expert", measure_latency=False, progress=False
        )
        for _ in range(2)
    ]
    result = results[0]
    assert sum(g.kept for g in result.plan.groups) == 8
    assert result.plan.to_json() == results[1].plan.to_json()
    assert result.report.proof["difference"] < 1e-9
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert "routers may not choose the removed experts" in " ".join(str(result.report).split())
    figures = {f.stage: f.loss for f in result.report.figures}
    assert figures.get("repaired", 0.0) <= figures["pruned"]
    sc.save(result.model, tmp_path)
    assert torch.equal(logits(sc.load(tmp_path, maker("qwen2")), words()), logits(result.model, words()))


def test_an_expert_that_no_token_is_sent_to_goes_first() -> None:
    model = make("plain")
    with torch.no_grad():
        for block in model.blocks:
            block.router.bias[3] = -1e4
    batches = [(part, part[:, 0]) for part in words(20, 16).chunk(5)]

    def loss(which: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(which(batch[0])[:, -1], batch[1])

    result = sc.prune(
        model, batches, sc.Budget(experts=10), "tod", "expert", loss_fn=loss, measure_latency=False,
        progress=False,
    )  # fmt: skip
    assert [group.removed for group in result.plan.groups] == [(3,), (3,)]
    with torch.no_grad():
        torch.testing.assert_close(result.model(words()), model(words()), rtol=1e-4, atol=1e-4)


class _HalfRouter(torch.nn.Module):
    """A router that computes in half precision, whatever its tokens come in."""

    def __init__(self, router: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(router.weight.detach().half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


def test_a_router_in_half_precision(tmp_path: Path) -> None:
    def mixed() -> torch.nn.Module:
        model = make("plain")
        for block in model.blocks:
            block.router = _HalfRouter(block.router)
        return model

    batches = [(part, part[:, 0]) for part in words(20, 16).chunk(5)]

    def loss(which: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(which(batch[0])[:, -1], batch[1])

    result = sc.prune(
        mixed(), batches, sc.Budget(experts=0.5), "tod", "expert", loss_fn=loss, measure_latency=False,
        progress=False,
    )  # fmt: skip
    assert sum(g.kept for g in result.plan.groups) == 6
    assert result.report.proof["difference"] < 1e-9
    assert result.model.blocks[0].router.weight.dtype is torch.float16
    sc.save(result.model, tmp_path)
    loaded = sc.load(tmp_path, mixed)
    assert torch.equal(logits(loaded, words()), logits(result.model, words()))


@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
def test_dense_layers_among_the_others_stay_whole(family: str) -> None:
    model = make(family)
    result = sc.prune(
        model, data(), sc.Budget(experts=0.75), "uniform", "expert", measure_latency=False, progress=False
    )
    dense = {n: t for n, t in model.state_dict().items() if n.startswith("model.layers.0.mlp.")}
    small = result.model.state_dict()
    assert "model.layers.0.mlp.gate_proj.weight" in dense
    assert all(torch.equal(small[n], t) for n, t in dense.items())
    assert not any(g.name.startswith("model.layers.0.") for g in result.plan.groups)


def test_forms_that_experts_do_not_have_are_refused() -> None:
    with pytest.raises(sc.SettingError, match="expected one of auto, module with granularity 'expert'"):
        sc.prune(make("plain"), [], sc.Budget(experts=0.5), "tod", "expert", form="graph")


def test_repairs_for_units_are_refused_before_scoring() -> None:
    with pytest.raises(sc.SettingError, match="expected None, 'auto', 'experts', 'merge' or"):
        sc.prune(make("plain"), [], sc.Budget(experts=0.5), "tod", "expert", repair="batchnorm")
