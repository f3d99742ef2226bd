"""Blocks through the whole pipeline: scored, decided, dropped, repaired, in one round and in several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CalibrationError, ScoreError
from secateur.signals.blocks import SIGNALS
from secateur.targets.blocks.block import bypassing
from secateur.targets.blocks.remove import removed_paths
from secateur.targets.blocks.repair import bypassed
from secateur.targets.units.compare import relative_difference, run
from tests.targets.blocks.models import IDS, LIBRARIES, ROWS, Chain, make

DATA = [(torch.randn(12, 6), torch.arange(12) % 3) for _ in range(6)]
QUIET: dict[str, Any] = {"granularity": "block", "measure_latency": False, "progress": False}


def chain() -> tuple[Chain, Any]:
    model: Any = make("chain")[0]
    return model, sc.trace(model, ROWS, granularity="block")


def streams(model: Chain, x: Tensor) -> list[Tensor]:
    """The stream before each block, and behind the last one."""
    found = [model.stem(x)]
    for block in model.blocks:
        found.append(block(found[-1]))
    return found


def test_signals_are_what_their_formulas_say() -> None:
    model, graph = chain()
    scores = sc.score(graph, DATA, tuple(SIGNALS), progress=False)
    x, y = torch.cat([a for a, _ in DATA]), torch.cat([b for _, b in DATA])
    with torch.no_grad():
        seen = streams(model, x)
    change, distance, output, sensitivity, weights = [], [], [], [], []
    for k, block in enumerate(model.blocks):
        before, after = seen[k].double(), seen[k + 1].double()
        cosine = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
        change.append(float((1 - cosine).mean()))
        distance.append(float((after - before).square().sum() / after.square().sum()))
        with torch.no_grad():
            whole = model(x)
            with bypassing(model, [graph.blocks["blocks"][k]]):
                moved = model(x)
        output.append(float((moved - whole).square().sum() / whole.square().sum()))
        weights.append(sum(float(p.detach().double().square().sum()) for p in block.parameters()) ** 0.5)
        total = 0.0
        for a, b in DATA:
            factor = torch.ones((), requires_grad=True)
            stream = model.stem(a)
            for j, other in enumerate(model.blocks):
                step = other(stream) - stream
                stream = stream + (factor * step if j == k else step)
            (gradient,) = torch.autograd.grad(F.cross_entropy(model.head(stream), b), factor)
            total += float(gradient)
        sensitivity.append(abs(total))
    assert len(y) == scores.samples
    for name, expected in (
        ("stream_change", change),
        ("stream_distance", distance),
        ("output_change", output),
        ("block_taylor", sensitivity),
        ("magnitude", weights),
    ):
        assert scores[name]["blocks"] == pytest.approx(expected, rel=1e-4), name
    assert ((scores["random"]["blocks"] >= 0) & (scores["random"]["blocks"] < 1)).all()


def test_scores_leave_the_model_as_it_was_and_do_not_hang_on_batches() -> None:
    model, graph = chain()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    one = sc.score(graph, [(torch.cat([a for a, _ in DATA]), torch.cat([b for _, b in DATA]))],
                   ("output_change", "stream_change*magnitude"), progress=False)  # fmt: skip
    many = sc.score(graph, DATA, ("output_change", "stream_change*magnitude"), progress=False)
    assert set(one.values) == {"output_change", "stream_change", "magnitude", "stream_change*magnitude"}
    for name in one.values:
        assert one[name]["blocks"] == pytest.approx(many[name]["blocks"], rel=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_signals_say_what_they_need() -> None:
    _, graph = chain()
    with pytest.raises(CalibrationError, match="expected calibration data for stream_change, got none"):
        sc.score(graph, None, "stream_change")
    with pytest.raises(ScoreError, match="or an instance of BlockSignal, got 'wasserstein'"):
        sc.score(graph, DATA, "wasserstein", progress=False)


@pytest.mark.skipif("llama" not in LIBRARIES, reason="transformers is not installed")
def test_padding_does_not_count() -> None:
    model, inputs = make("llama")
    graph: Any = sc.trace(model, inputs, granularity="block")
    longer = torch.cat([IDS, torch.full((2, 4), 5)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 4, dtype=torch.long)], 1)
    plain = sc.score(graph, [{"input_ids": IDS}], "stream_change", progress=False)
    padded = sc.score(graph, [{"input_ids": longer, "attention_mask": mask}], "stream_change", progress=False)
    assert plain["stream_change"]["model.layers"] == pytest.approx(
        padded["stream_change"]["model.layers"], rel=1e-4
    )


@pytest.mark.parametrize("rule", ["global", "tod", "emp", "uniform", "random"])
def test_every_rule_meets_its_budget(rule: str) -> None:
    model, _ = chain()
    result = sc.prune(model, DATA, sc.Budget(params=0.75), rule, repair=None, **QUIET)
    assert result.plan.predicted.params <= 0.75 * result.plan.dense.params
    assert sum(p.numel() for p in result.model.parameters()) == result.plan.predicted.params
    assert result.report.proof["reference"] == "blocks bypassed"
    assert "dropped: blocks." in str(result.report).lower() or "dropped:" in result.report.note


def test_rules_are_compared_at_equal_budgets() -> None:
    model, _ = chain()
    found = sc.compare(model, DATA, ("global", "uniform"), [sc.Budget(params=0.75)], granularity="block",
                       progress=False)  # fmt: skip
    assert {outcome.rule for outcome in found.outcomes} == {"global", "uniform"}
    assert all(outcome.cost.params <= 0.75 * found.cost.params for outcome in found.outcomes)


def test_other_rules_are_refused_in_words() -> None:
    with pytest.raises(sc.SettingError, match="expected one of auto, global, tod, emp, uniform, random or"):
        sc.prune(chain()[0], DATA, sc.Budget(params=0.75), "repair_aware", **QUIET)


def test_rounds_score_anew_and_end_at_the_same_budget() -> None:
    model, graph = chain()
    rule = sc.Global(removal="output_change")
    result = sc.prune(model, DATA, sc.Budget(params=0.5), rule, steps=3, **QUIET)
    assert result.plan.settings["steps"] == 3
    assert result.plan.predicted.params <= 0.5 * result.plan.dense.params
    assert {group.name: group.size for group in result.plan.groups} == {"blocks": 4}
    # By hand: the block that counts least, then the one that counts least without it and after a refit.
    scores = sc.score(graph, sc.Calibration.of(DATA).split()[0], "output_change", progress=False)
    assert int(scores["output_change"]["blocks"].argmin()) in result.plan.groups[0].removed


def test_blocks_that_are_to_stay_do_so_in_every_round() -> None:
    torch.manual_seed(0)
    model = Chain(7).eval()
    for ignore in (("blocks.1", "blocks.5"), (model.blocks[1], model.blocks[5])):
        limits = sc.Limits(ignore=ignore)
        result = sc.prune(model, DATA, sc.Budget(params=0.5), "global", limits=limits, steps=3, **QUIET)
        assert not {1, 5} & {*result.plan.groups[0].removed}
        assert len(result.plan.groups[0].removed) >= 4


@pytest.mark.parametrize("steps", [1, 3])
def test_a_budget_of_blocks(steps: int) -> None:
    model, inputs = make("resnet")
    data = [(torch.randn(8, *inputs.shape[1:]), torch.arange(8) % 4) for _ in range(5)]
    result = sc.prune(model, data, sc.Budget(blocks=0.4), "global", steps=steps, **QUIET)
    assert [(group.kept, group.size) for group in result.plan.groups] == [(2, 5)]
    assert "2 of 5, 40.0 %" in result.report.to_markdown()
    with pytest.raises(sc.BudgetError, match=r"a bound on macs or params, got blocks\. Use granularity"):
        sc.prune(model, data, sc.Budget(blocks=0.4), "uniform", progress=False)


def test_stages_go_on_in_rounds() -> None:
    model, inputs = make("resnet")
    data = [(torch.randn(8, *inputs.shape[1:]), torch.arange(8) % 4) for _ in range(5)]
    result = sc.prune(model, data, sc.Budget(macs=0.55), "global", steps=3, **QUIET)
    assert result.plan.predicted.macs <= 0.55 * result.plan.dense.macs
    assert sc.verify(model, sc.apply(model, result.plan), result.plan).difference < 1e-9


def test_the_bypassed_network_computes_what_the_smaller_one_does() -> None:
    for name in ("resnet", "tuples", "indexed"):
        model, inputs = make(name)
        graph: Any = sc.trace(model, inputs, granularity="block")
        scores = sc.score(graph, None, "magnitude")
        plan = sc.Uniform(ratio=0.5, removal="magnitude").allocate(graph, scores)
        small = sc.apply(model, plan, graph=graph)
        opened = bypassed(small, model, graph)
        assert {*opened.state_dict()} == {*model.state_dict()}
        assert relative_difference(run(opened, (inputs,), {}), run(small, (inputs,), {})) < 1e-6


@pytest.mark.parametrize("name", ["chain", "resnet", "indexed"])
def test_repair_brings_the_output_nearer(name: str) -> None:
    model, inputs = make(name)
    shape = inputs.shape[1:]
    data = [torch.randn(16, *shape, generator=torch.Generator().manual_seed(k)) for k in range(8)]
    graph: Any = sc.trace(model, inputs, granularity="block")
    scores = sc.score(graph, data, "output_change", progress=False)
    rule = sc.Uniform(ratio=0.4, removal="output_change")
    plan = rule.allocate(graph, scores)
    small = sc.apply(model, plan, graph=graph)
    better = sc.repair(small, model, data, "reconstruct", graph=graph, progress=False)
    (entry,) = sc.record_of(better).repairs
    assert entry["kept"]
    assert entry["after"] < 0.8 * entry["before"]
    fresh = [torch.randn(64, *shape, generator=torch.Generator().manual_seed(99))]
    before, after = (sc.evaluate(m, fresh, dense=model).loss for m in (small, better))
    assert after < before
    assert type(better) is type(model)
    assert {n: t.shape for n, t in better.state_dict().items()} == {
        n: t.shape for n, t in small.state_dict().items()
    }


def test_a_linear_chain_is_repaired_exactly() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x)

    torch.manual_seed(0)
    model = nn.Sequential(*(Step() for _ in range(3))).double().eval()
    data = [torch.randn(40, 6, dtype=torch.float64) for _ in range(8)]
    graph: Any = sc.trace(model, data[0], granularity="block")
    plan = sc.Plan.build(graph, {"blocks": np.array([True, False, True])}, allocator="hand")
    small = sc.apply(model, plan, graph=graph)
    better = sc.repair(small, model, data, "reconstruct", graph=graph, progress=False)
    assert sc.evaluate(better, data, dense=model).loss < 1e-6


def test_polish_trains_what_is_left() -> None:
    model, inputs = make("chain")
    data = [torch.randn(16, 6, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    graph: Any = sc.trace(model, inputs, granularity="block")
    plan = sc.Plan.build(graph, {"blocks": np.array([True, False, True, True])}, allocator="hand")
    small = sc.apply(model, plan, graph=graph)
    better = sc.repair(small, model, data, ["reconstruct", sc.Polish(passes=3)], graph=graph, progress=False)
    assert [e["method"] for e in sc.record_of(better).repairs] == ["reconstruct", "polish"]
    assert sc.evaluate(better, data, dense=model).loss < sc.evaluate(small, data, dense=model).loss


class ByLength(Chain):
    """What runs between two blocks depends on their places, and on the length of the inputs."""

    def stream(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            if k % 2 and x.shape[1] > 6:
                x = x.flip(1).cumsum(1)
            x = block(x)
        return x


class ByValue(Chain):
    """Large values leave early, by the number of blocks so far."""

    def stream(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k >= 2 and x.abs().max() > 8:
                break
        return x


@pytest.mark.parametrize("kind", [ByLength, ByValue])
def test_every_kind_of_batch_in_the_data_is_compared(kind: type[nn.Module]) -> None:
    """The first batch takes one way through the code; the others take another."""
    torch.manual_seed(0)
    model = kind().eval()
    scale = 20.0 if kind is ByValue else 1.0
    data = [torch.randn(8, 4, 6), *(scale * torch.randn(8, n, 6) for n in (12, 4, 12, 8, 12))]
    graph = sc.trace(model, data[0], granularity="block", more_inputs=data[1:])  # type: ignore[call-overload]
    assert graph.removals == {"blocks": "pass"}
    result = sc.prune(
        model, data, sc.Budget(blocks=0.5), "uniform", "block", repair=None,
        measure_latency=False, progress=False,
    )  # fmt: skip
    gone = [block for block in result.graph.all_blocks() if block.path in removed_paths(result.plan)]
    assert len(gone) == 2
    for batch in data:
        with torch.no_grad(), bypassing(model, gone):
            wanted = model(batch)
        torch.testing.assert_close(result.model(batch), wanted, rtol=1e-4, atol=1e-4)


def test_a_bound_that_counts_nothing_here_is_said_once() -> None:
    torch.manual_seed(0)
    with pytest.raises(sc.BudgetError, match="granularity 'expert'"):
        sc.prune(
            Chain().eval(), [torch.randn(8, 6) for _ in range(4)], sc.Budget(experts=0.5),
            granularity="block", progress=False,
        )  # fmt: skip
