"""Units and experts under one budget: ``granularity=["unit", "expert"]``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.targets.experts.repair import repair
from secateur.targets.together.apply import verify, without_experts, without_units
from secateur.targets.together.graph import Joined, part
from secateur.targets.together.rule import Together
from tests.targets.experts.models import PlainLM, make, maker, words
from tests.targets.experts.test_apply import logits

BOTH = ["unit", "expert"]
FOURS = sc.Limits(round_to=4)  # the kernel of fused experts reads rows in multiples of 16 bytes
PAIRS = [("magnitude", "weight_norm")]


@cache
def traced(family: str = "plain") -> tuple[nn.Module, Joined]:
    model = make(family)
    graph: Any = sc.trace(model, words(), granularity=BOTH)  # type: ignore[call-overload]
    return model, graph


def planned(graph: Joined, params: float = 0.6) -> sc.Plan:
    scores = sc.score(graph, None, PAIRS, progress=False)  # type: ignore[arg-type]
    rule = Together(sc.Uniform(removal="magnitude"), sc.Uniform(removal="weight_norm"))
    return rule.allocate(graph, scores, sc.Budget(params=params), FOURS)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["plain", "qwen2"])
def test_one_budget_decides_on_both_and_the_result_is_proven(family: str, tmp_path: Path) -> None:
    model, graph = traced(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = planned(graph)
    cut = {group.name for group in plan.groups if group.removed}
    assert cut & {block.name for block in graph.others.blocks}
    assert cut & {group.name for group in graph.units.groups}

    small = sc.apply(model, plan, graph=graph)  # type: ignore[arg-type]
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.params <= 0.6 * plan.dense.params
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    proof = sc.verify(model, small, plan, words())
    assert proof.difference < 1e-9
    assert proof.reference == "masked, experts excluded"

    sc.save(small, tmp_path)
    loaded = sc.load(tmp_path, maker(family))
    assert torch.equal(logits(loaded, words()), logits(small, words()))
    assert sc.record_of(loaded).plan == plan


def test_a_plan_read_from_its_file_applies_whatever_tokens_the_experts_got() -> None:
    """MACs depend on which expert a token chooses, and the trace of `apply` has other tokens."""
    model, graph = traced()
    plan = planned(graph)
    small = sc.apply(model, sc.Plan.from_json(plan.to_json()))
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.params


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_experts_may_have_a_share_of_the_saving(share: float) -> None:
    """Then rules whose knobs mean different things go together."""
    _, graph = traced()
    scores = sc.score(graph, None, PAIRS, progress=False)  # type: ignore[arg-type]
    rules = {"unit": sc.Global(), "expert": sc.Uniform(removal="weight_norm"), "share": share}
    rule, budget = Together.of(rules), sc.Budget(params=0.7)
    plan = rule.allocate(graph, scores, budget)  # type: ignore[arg-type]
    dense = graph.cost().params
    assert plan.predicted.params <= 0.7 * dense
    experts = {group.name: group.keep for group in part(plan, "expert").groups}
    saving = dense - graph.cost(experts).params
    assert (saving == 0) == (share == 0)
    assert share == 1 or saving <= share * 0.3 * dense + 1
    assert any(group.removed for group in part(plan, "unit").groups) == (share < 1)
    axes: Any = plan.certificates["axes"]
    assert axes["expert"]["params"] == pytest.approx(saving / dense, abs=1e-4)


def test_parameters_are_counted_exactly_for_any_choice() -> None:
    model, graph = traced()
    draws = np.random.default_rng(0)
    for _ in range(10):
        keep = {}
        for group in graph.groups:
            fewest = 2 if group.name in {b.name for b in graph.others.blocks} else 1
            mask = np.zeros(group.size, dtype=bool)
            mask[draws.permutation(group.size)[: draws.integers(fewest, group.size + 1)]] = True
            keep[group.name] = mask
        plan = sc.Plan.build(graph, keep, allocator="drawn")
        small = sc.apply(model, plan, graph=graph)  # type: ignore[arg-type]
        assert sum(p.numel() for p in small.parameters()) == graph.cost(keep).params
        stage = {name: np.where(mask, 1, 0) for name, mask in keep.items()}
        params, macs = graph.sweep(stage, 1)
        assert (params[0], macs[0]) == (graph.cost(keep).params, graph.cost(keep).macs)
    assert graph.cost().params == sum(p.numel() for p in model.parameters())


class NoNorm(PlainLM):
    """Nothing mixes the stream, so that it loses units, and routers read fewer of them."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def test_a_router_costs_its_rows_times_the_width_that_it_reads() -> None:
    """Units and experts must not save the same MACs twice."""
    torch.manual_seed(0)
    model = NoNorm().eval()
    graph: Any = sc.trace(model, words(), granularity=BOTH)  # type: ignore[call-overload]
    blocks = {block.name: block for block in graph.others.blocks}
    draws = np.random.default_rng(1)
    fewest = {g.name: blocks[g.name].min_keep if g.name in blocks else 1 for g in graph.groups}
    least = {g.name: np.arange(g.size) < fewest[g.name] for g in graph.groups}
    drawn = {g.name: draws.permutation(g.size) < draws.integers(fewest[g.name], g.size) for g in graph.groups}
    narrowed = 0
    for keep in (least, drawn):
        small = sc.apply(model, sc.Plan.build(graph, keep, allocator="drawn"), graph=graph)  # type: ignore[arg-type]
        of_units = {name: mask for name, mask in keep.items() if name not in blocks}
        expected = graph.units.cost(of_units).macs
        for block in blocks.values():
            width = small.get_submodule(block.router).weight.shape[1]
            narrowed += width < model.get_submodule(block.router).weight.shape[1]
            expected -= words().shape[1] * int((~keep[block.name]).sum()) * width
        assert graph.cost(keep).macs == expected > 0
    assert narrowed, "the case needs routers that read fewer units"


def test_a_spoilt_weight_is_noticed() -> None:
    model, graph = traced()
    plan = planned(graph)
    for name in ("blocks.0.router.weight", "blocks.1.experts.0.down.weight", "blocks.0.shared.up.weight"):
        small = sc.apply(model, plan, graph=graph)  # type: ignore[arg-type]
        with torch.no_grad():
            small.get_parameter(name).add_(0.1)
        with pytest.raises(sc.VerificationError):
            verify(model, small, plan, words(), graph=graph)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(part, part[:, 0]) for part in words(40, 16).chunk(5)]


def last_word(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0])[:, -1], batch[1])


@pytest.mark.parametrize("allocator", [None, "uniform", {"unit": sc.EMP(), "expert": sc.EMP(removal="reap")}])
def test_prune_takes_a_list(allocator: Any, tmp_path: Path) -> None:
    model = make("plain")
    results = [
        sc.prune(
            model,
            batches(),
            sc.Budget(params=0.75),
            allocator,
            order,  # type: ignore[arg-type]
            loss_fn=last_word,
            measure_latency=False,
            progress=False,
        )
        for order in ([BOTH, tuple(reversed(BOTH))] if allocator == "uniform" else [BOTH])
    ]
    result = results[0]
    assert result.plan.to_json() == results[-1].plan.to_json()
    assert result.plan.granularity == "unit+expert"
    assert result.plan.predicted.params <= 0.75 * result.plan.dense.params
    assert result.report.proof["difference"] < 1e-9
    assert result.report.asked["granularity"] == "unit+expert"
    if allocator == "uniform":
        assert result.report.repairs[-1]["method"] == "experts"
    if allocator is None:
        assert result.report.selection is not None
        names = {c.name for c in result.report.selection.candidates}
        assert {"uniform", "units alone, emp", "experts alone, uniform"} <= names
    html, text = tmp_path / "report.html", str(result.report)
    result.report.to_html(html)
    assert "routers may not choose" in " ".join(text.split())
    assert html.stat().st_size > 1000
    sc.save(result.model, tmp_path / "small")
    loaded = sc.load(tmp_path / "small", maker("plain"))
    assert torch.equal(logits(loaded, words()), logits(result.model, words()))


def test_experts_of_unequal_widths_are_refitted() -> None:
    """Units of experts go first, and not equally many of each."""
    model, graph = traced()
    keep = {group.name: np.ones(group.size, dtype=bool) for group in graph.groups}
    keep["blocks.0.experts.1.up"][:5] = False
    keep["blocks.0"][[0, 3]] = False
    plan = sc.Plan.build(graph, keep, allocator="by hand")
    units = without_units(model, plan, graph)
    small = without_experts(units, model, plan, graph)
    better = repair(small, units, batches(), graph=graph.others, progress=False)
    entry = sc.record_of(better).repairs[-1]
    assert entry["kept"]
    assert entry["after"] < entry["before"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"granularity": ["unit", "weight"]},
            r"expected one of 'unit', 'weight', 'expert', 'unit\+expert', ",
        ),
        ({"granularity": BOTH, "allocator": "global"}, "have no common scale"),
        ({"granularity": BOTH, "allocator": {"unit": sc.ToD(), "expert": sc.EMP()}}, "expected one rule"),
        ({"granularity": BOTH, "steps": 2}, "steps"),
        ({"granularity": BOTH, "allow_inexact": True}, "allow_inexact"),
        ({"granularity": BOTH, "form": "graph"}, "form"),
        ({"granularity": BOTH, "repair": "nonsense"}, "nonsense"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sc.SettingError, match=message):
        sc.prune(make("plain"), batches(), sc.Budget(params=0.75), **options)


def test_signals_come_in_pairs() -> None:
    _, graph = traced()
    with pytest.raises(sc.SettingError, match="expected pairs of a signal for units and one for experts"):
        sc.score(graph, None, ["magnitude"], progress=False)  # type: ignore[arg-type]


def test_rows_that_depend_on_the_data_are_no_samples() -> None:
    """How many tokens an expert gets depends on them: no activation can be told by sample."""
    model, both = traced()
    graph = both.units
    with pytest.raises(sc.ScoreError, match="depends on the data, such as the tokens of an expert"):
        sc.score(graph, batches(), "activation", progress=False)
    scores = sc.score(graph, [words(1, 2)] * 2, "reconstruction", progress=False)  # some get no token
    plan = sc.Uniform(removal="reconstruction").allocate(graph, scores, sc.Budget(params=0.7))
    small = sc.apply(model, plan, graph=graph)
    small = sc.repair(small, model, batches(), "reconstruct", progress=False)
    refitted = sc.record_of(small).repairs[0].get("layers", {})
    assert not [name for name in refitted if ".experts." in name]
