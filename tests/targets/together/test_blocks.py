"""Units and residual blocks under one budget: ``granularity=["unit", "block"]``."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.repairs.methods import REPAIRS
from secateur.targets.together.blocks import verify, whole_where_dropped
from secateur.targets.together.graph import Joined, part
from secateur.targets.together.rule import Together
from tests.targets.blocks.models import IDS, LIBRARIES, PLAIN, ROWS, Chain, Residual, Sharing, make
from tests.targets.blocks.test_blocks import output
from tests.targets.headsizes.models import WIDTH, chain
from tests.zoo.importing import import_transformers

BOTH: Any = ["unit", "block"]
QUICK = ["chain", "zipped", "resnet"]
OTHERS = [name for name in (*PLAIN, *LIBRARIES) if name not in (*QUICK, "stateful", "t5", "qwen2_moe")]
NETWORKS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@cache
def traced(name: str) -> tuple[nn.Module, Any, Joined]:
    model, inputs = make(name)
    graph: Any = sc.trace(model, inputs, granularity=BOTH)
    return model, inputs, graph


def drawn(graph: Joined, seed: int) -> sc.Plan:
    """A plan that removes any units and blocks."""
    generator = np.random.default_rng(seed)
    keep = {group.name: generator.random(group.size) < 0.6 for group in graph.groups}
    for mask in keep.values():
        mask[generator.integers(len(mask))] = True
    return sc.Plan.build(graph, keep, allocator="drawn", seed=seed)


def shared(share: float, units: sc.Allocator | None = None) -> Together:
    """A rule that reads no data."""
    return Together(units or sc.Uniform(), sc.Uniform(), share, what="block")


def planned(graph: Joined, rule: Any, budget: sc.Budget | None = None, limits: Any = None) -> sc.Plan:
    scores = sc.score(graph, None, [("magnitude", "magnitude")], progress=False)  # type: ignore[arg-type,list-item]
    return Together.of(rule, "block").allocate(graph, scores, budget, limits)  # type: ignore[arg-type]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_equals_the_masked_network_that_bypasses_blocks(name: str, tmp_path: Path) -> None:
    model, inputs, graph = traced(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert graph.cost().params == parameters(model)
    for seed in range(1 if name == "resnet" else 2):
        plan = drawn(graph, seed)
        small = sc.apply(model, plan, graph=graph)  # type: ignore[arg-type]
        proof = verify(model, small, plan, graph=graph)
        assert proof.difference <= 1e-9
        assert proof.proven
        assert proof.reference == "blocks bypassed, then masked"
        cost = sc.trace(small, inputs).cost()
        predicted = plan.predicted
        assert (cost.params, cost.macs) == (predicted.params, predicted.macs)
        assert cost.params == parameters(small) < plan.dense.params
        sc.save(small, tmp_path)
        again = sc.load(tmp_path, lambda: make(name)[0])
        assert sc.record_of(again) == sc.record_of(small)
        assert all(
            torch.equal(a, b) for a, b in zip(output(small, inputs), output(again, inputs), strict=True)
        )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("bounds", [{"params": 0.5}, {"macs": 0.4}, {"params": 0.5, "macs": 0.5}])
def test_budgets_hold_and_blocks_keep_to_their_share(share: float, bounds: dict[str, float]) -> None:
    _, _, graph = traced("resnet")
    plan = planned(graph, shared(share), sc.Budget(**bounds))  # type: ignore[arg-type]
    dense = graph.cost()
    for name, bound in bounds.items():
        assert getattr(plan.predicted, name) <= bound * getattr(dense, name)
    blocks = {group.name: group.keep for group in part(plan, "block").groups}
    alone = graph.cost(blocks)
    cut = any(group.removed for group in part(plan, "unit").groups)
    if share == 1:
        assert not cut
        return
    assert cut
    for name, bound in bounds.items():
        saving = getattr(dense, name) - getattr(alone, name)
        assert saving <= share * (1 - bound) * getattr(dense, name) + 1
    assert share in (0, 0.25) or alone != dense
    assert share or alone == dense


def test_a_block_that_goes_frees_its_units_and_units_make_blocks_cheaper() -> None:
    _, _, graph = traced("chain")
    (blocks,) = graph.others.groups
    inner = next(group for group in graph.units.groups if group.name == "blocks.1.up")
    gone = {blocks.name: np.array([True, False, True, True])}
    half = {inner.name: np.arange(inner.size) < inner.size // 2}
    assert graph.cost(gone | half) == graph.cost(gone)
    rest, other = graph.given(gone), graph.cost(gone)
    assert (rest.cost().params, rest.cost().macs) == (other.params, other.macs)
    assert rest.cost(half) == rest.cost()
    assert graph.cost(half).params - graph.cost(gone | half).params < graph.cost().params - other.params


@pytest.mark.parametrize("gone", range(4))
@pytest.mark.parametrize("whole", [False, True])
def test_blocks_that_share_weights_or_are_one_module(gone: int, whole: bool, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(5, 16), nn.Linear(16, 3)
            self.blocks = nn.ModuleList(Residual(16) for _ in range(4))
            layers = [next(m for m in block.modules() if isinstance(m, nn.Linear)) for block in self.blocks]
            if whole:
                self.blocks[2].load_state_dict(self.blocks[1].state_dict())
                for one, other in zip(self.blocks[1].modules(), self.blocks[2].modules(), strict=True):
                    other._parameters.update(one._parameters)
            layers[2].weight = layers[1].weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x)
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    torch.manual_seed(0)
    model, inputs = Tied().eval(), torch.randn(4, 5)
    graph: Any = sc.trace(model, inputs, granularity=BOTH)
    keep = {group.name: np.arange(group.size) % 3 != 1 for group in graph.units.groups}
    keep["blocks"] = np.arange(4) != gone
    plan = sc.Plan.build(graph, keep, allocator="drawn")
    small = sc.apply(model, plan, graph=graph)
    assert verify(model, small, plan, inputs, graph=graph).difference <= 1e-9
    assert parameters(small) == plan.predicted.params
    again = sc.load(sc.save(small, tmp_path), Tied)
    torch.testing.assert_close(again(inputs), small(inputs))


def test_units_inside_blocks_that_go_mean_nothing() -> None:
    model, _, graph = traced("chain")
    keep = {group.name: np.ones(group.size, dtype=bool) for group in graph.groups}
    keep["blocks"][1] = False
    keep["blocks.2.up"][3:9] = False
    plain = sc.Plan.build(graph, keep, allocator="drawn")
    keep["blocks.1.up"][:20] = False
    more = sc.Plan.build(graph, keep, allocator="drawn")
    assert more.predicted == plain.predicted
    one, other = (sc.apply(model, plan, graph=graph) for plan in (plain, more))  # type: ignore[arg-type]
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())
    assert whole_where_dropped(model, more).keep["blocks.1.up"].all()


@pytest.mark.parametrize("whole", [False, True])
def test_what_blocks_share_is_counted_until_the_last_of_them_goes(whole: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Sharing(whole), torch.randn(2, 6)
    graph: Any = sc.trace(model, inputs, granularity=BOTH)
    generator = np.random.default_rng(0)
    for gone in ([0], [0, 2], [0, 1, 2], [1, 3]):
        keep = {group.name: generator.random(group.size) < 0.7 for group in graph.units.groups}
        keep["blocks"] = ~np.isin(np.arange(4), gone)
        plan = sc.Plan.build(graph, keep, allocator="drawn")
        small = sc.apply(model, plan, graph=graph)
        assert parameters(small) == plan.predicted.params
        assert verify(model, small, plan, inputs, graph=graph).difference <= 1e-9


def test_a_layer_that_a_staying_block_shares_is_repaired() -> None:
    torch.manual_seed(0)
    model, inputs = Sharing(True), torch.randn(64, 6)
    graph: Any = sc.trace(model, inputs[:2], granularity=BOTH)
    keep = {group.name: np.arange(group.size) % 4 != 1 for group in graph.units.groups}
    keep["blocks"] = np.arange(4) > 0
    plan = sc.Plan.build(graph, keep, allocator="drawn")
    small = sc.apply(model, plan, graph=graph)
    better = sc.repair(small, model, [inputs], "reconstruct", graph=graph, progress=False)
    errors = [float((m(inputs) - model(inputs)).square().mean()) for m in (small, better)]
    assert errors[1] < errors[0]


def test_a_bound_on_blocks_says_how_many_go() -> None:
    _, _, graph = traced("chain")
    plan = planned(graph, shared(0.25), sc.Budget(blocks=2, params=0.4))
    assert part(plan, "block").groups[0].kept == 2
    assert plan.predicted.params <= 0.4 * plan.dense.params
    alone = planned(graph, shared(0.25), sc.Budget(blocks=0.5))
    assert [group.name for group in alone.groups if group.removed] == ["blocks"]
    with pytest.raises(sc.BudgetError, match=r"expected blocks that may go for Budget\(blocks=2\), got none"):
        planned(graph, shared(0.0), sc.Budget(blocks=2, params=0.4))


def test_what_cannot_be_reached_is_said_in_the_form_of_the_budget() -> None:
    _, _, graph = traced("chain")
    with pytest.raises(sc.UnreachableBudgetError) as caught:
        planned(graph, shared(0.25), sc.Budget(params=0.2), sc.Limits(max_ratio=0.5))
    assert "save up to 0.25 of what the budget saves; another share may reach it" in str(caught.value)
    assert 0.2 < caught.value.smallest < 0.5
    planned(graph, shared(0.25), sc.Budget(params=caught.value.smallest), sc.Limits(max_ratio=0.5))


def test_limits_hold_for_both() -> None:
    _, _, graph = traced("chain")
    limits = sc.Limits(round_to=8, ignore=("blocks.0", "stem"))
    plan = planned(graph, shared(0.5), sc.Budget(params=0.5), limits)
    removed = {group.name: group for group in plan.groups if group.removed}
    assert not {"stem", "blocks.0.up"} & set(removed)
    assert 0 not in removed["blocks"].removed
    assert 0 < removed["blocks"].kept < 4  # multiples are of units
    assert all(group.kept % 8 == 0 for name, group in removed.items() if name != "blocks")
    whole = planned(graph, shared(0.5), sc.Budget(params=0.5), sc.Limits(ignore=("blocks.*.up",)))
    assert {group.name for group in whole.groups if group.removed} == {"stem"}
    assert plan.curve.kept[-1][-1] == removed["blocks"].kept
    with pytest.raises(sc.SettingError, match="got 'nowhere', which matches none"):
        planned(graph, shared(0.5), sc.Budget(params=0.5), sc.Limits(ignore=("nowhere",)))


def test_where_limits_keep_one_axis_the_other_one_saves_all() -> None:
    _, _, graph = traced("chain")
    budget = sc.Budget(params=0.7)
    no_units = sc.Limits(ignore=tuple(group.name for group in graph.units.groups))
    plan = planned(graph, shared(0.25), budget, no_units)  # names of groups say nothing of blocks
    assert [group.name for group in plan.groups if group.removed] == ["blocks"]
    assert plan.predicted.params <= 0.7 * plan.dense.params
    with pytest.raises(sc.NothingToPruneError, match="expected units that may go"):
        planned(graph, shared(0.0), budget, no_units)
    no_blocks = sc.Limits(ignore=("blocks",))
    assert planned(graph, shared(0.25), budget, no_blocks).keep["blocks"].all()
    assert planned(graph, shared(0.25), budget, no_blocks).predicted.params <= 0.7 * graph.cost().params
    with pytest.raises(sc.NothingToPruneError, match="expected blocks that may go"):
        planned(graph, shared(1.0), budget, no_blocks)
    rule = {"unit": sc.Uniform(), "block": sc.Uniform(ratio=0.5)}
    with pytest.raises(sc.SettingError, match="expected either a ratio or a budget, got both"):
        planned(graph, rule, budget)


def test_a_curve_of_two_knobs_is_refused() -> None:
    _, _, graph = traced("chain")
    scores = sc.score(graph, None, [("magnitude", "magnitude")], progress=False)  # type: ignore[arg-type,list-item]
    curve = shared(0.5).curve(graph, scores)  # type: ignore[arg-type]
    assert curve.params[-1] < curve.params[0] == graph.cost().params
    rule = Together(sc.Global(), sc.Uniform(), 0.5, what="block")
    with pytest.raises(sc.SettingError, match="curve: expected one knob for units and blocks"):
        rule.curve(graph, scores)  # type: ignore[arg-type]


def test_a_spoilt_weight_is_noticed() -> None:
    model, _, graph = traced("chain")
    plan = drawn(graph, 1)
    for name in ("blocks.0.up.weight", "head.weight"):
        small = sc.apply(model, plan, graph=graph)  # type: ignore[arg-type]
        with torch.no_grad():
            small.get_parameter(name).add_(0.1)
        with pytest.raises(sc.VerificationError):
            verify(model, small, plan, graph=graph)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 3, 8, 8, generator=generator), torch.arange(12) % 4) for _ in range(6)]


@pytest.mark.parametrize(
    "name", ["reconstruct", "bias", "variance", "batchnorm", pytest.param("polish", marks=pytest.mark.slow)]
)
def test_every_repair_sees_both_removals_at_once(name: str) -> None:
    assert name in REPAIRS
    model, _, graph = traced("resnet")
    plan = planned(graph, shared(0.5), sc.Budget(params=0.5))
    small = sc.apply(model, plan, graph=graph)  # type: ignore[arg-type]
    repaired = sc.repair(small, model, batches(), name, graph=graph, progress=False)  # type: ignore[arg-type]
    (tried,) = sc.record_of(repaired).repairs
    assert tried["method"] == name
    assert math.isfinite(tried["after"])
    assert tried["kept"]
    assert tried["after"] < tried["before"]
    assert sc.record_of(repaired).plan == plan
    assert [t.shape for t in repaired.state_dict().values()] == [t.shape for t in small.state_dict().values()]
    x = batches()[0][0]
    assert not torch.equal(repaired(x), small(x))


def test_prune_compares_shares_from_none_to_all(tmp_path: Path) -> None:
    result = sc.prune(
        _chain(),
        [torch.randn(32, 6, generator=torch.Generator().manual_seed(k)) for k in range(6)],
        sc.Budget(params=0.5),
        granularity=("block", "unit"),  # in any order
        measure_latency=False,
        progress=False,
    )
    report, plan = result.report, result.plan
    assert plan.granularity == report.asked["granularity"] == "unit+block"
    assert plan.predicted.params <= 0.5 * plan.dense.params
    assert report.selection is not None
    ran = {entry.name: entry.errors for entry in report.selection.candidates if entry.errors}
    names = {entry.name for entry in report.selection.candidates}
    assert {
        "units alone, repair_aware",
        "50% by blocks, output change",
        "blocks alone, global, stream change",
    } <= names
    chosen = report.selection.candidates[0]
    assert chosen.errors[-1] <= min(
        errors[-1] for errors in ran.values() if len(errors) == len(chosen.errors)
    )
    axes: Any = plan.certificates["axes"]
    assert axes["block"]["params"] + axes["unit"]["params"] == pytest.approx(
        1 - plan.predicted.params / plan.dense.params, abs=1e-4
    )
    for text in (" ".join(str(report).split()), report.to_markdown()):
        assert "of the parameters and" in text
        assert "units another" in text
        assert "in which the dropped blocks pass on what they read" in text
    assert "without the dropped blocks" in report.to_markdown()
    sc.save(result.model, tmp_path)
    again = sc.load(tmp_path, _chain)
    assert torch.equal(again(ROWS), result.model(ROWS))


def _chain() -> nn.Module:
    return make("chain")[0]


def test_head_sizes_go_along() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(10, 5, WIDTH), torch.arange(10) % 4) for _ in range(5)]
    model = chain().eval()
    result = sc.prune(
        model,
        data,
        sc.Budget(params=0.55),
        {"unit": sc.Uniform(), "block": sc.Global(removal="output_change"), "share": 0.75},
        ["unit", "head_size", "block"],  # type: ignore[list-item]
        "reconstruct",
        measure_latency=False,
        progress=False,
    )
    cut = {group.name for group in result.plan.groups if group.removed}
    assert "blocks" in cut
    assert any(name.endswith((".q", ".v")) for name in cut)
    assert result.report.proof["difference"] < 1e-9
    assert any(tried["kept"] for tried in result.report.repairs)
    assert parameters(result.model) == result.plan.predicted.params <= 0.55 * result.plan.dense.params


class Stubborn(Residual):
    """Its code takes one number of neurons only."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(x))
        if y.shape[-1] != 24:
            raise ValueError("not 24")
        return x + self.down(y)


def test_what_no_module_expresses_is_left_whole_and_its_block_may_still_go() -> None:
    torch.manual_seed(0)
    model = Chain(block=Stubborn).eval()
    result = sc.prune(
        model,
        [torch.randn(8, 6) for _ in range(4)],
        sc.Budget(params=0.6),
        {"unit": sc.Uniform(), "block": sc.Global(removal="stream_change"), "share": 0.75},
        BOTH,
        repair=None,
        measure_latency=False,
        progress=False,
    )
    assert {group.name for group in result.plan.groups if group.removed} == {"stem", "blocks"}
    assert parameters(result.model) == result.plan.predicted.params <= 0.6 * result.plan.dense.params
    assert "left whole" in result.report.note


@pytest.mark.slow
@pytest.mark.skipif(import_transformers() is None, reason="needs Transformers")
def test_stock_classes_load_even_counts_and_others_are_refused(tmp_path: Path) -> None:
    model, inputs, graph = traced("llama")
    rule = {"unit": sc.Uniform(ratio=0.25), "block": sc.Uniform(ratio=0.25)}
    small = sc.apply(model, planned(graph, rule), graph=graph)  # type: ignore[arg-type]
    sc.export(small, tmp_path / "even", inputs)
    again = type(model).from_pretrained(tmp_path / "even").eval()  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(output(small, inputs), output(again, inputs), strict=True))
    assert (again.config.num_hidden_layers, again.config.intermediate_size) == (3, 36)
    sc.export(small, tmp_path / "small.onnx", inputs)
    uneven = sc.apply(model, drawn(graph, 0), graph=graph)  # type: ignore[arg-type]
    with pytest.raises(sc.SecateurError, match="expected"):
        sc.export(uneven, tmp_path / "uneven", inputs)
    made = uneven.generate(IDS, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert made.shape[1] == IDS.shape[1] + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "rounds remove units or blocks, not both"),
        ({"allow_inexact": True}, "together with blocks"),
        ({"form": "graph"}, "form"),
        ({"repair": "nonsense"}, "nonsense"),
        ({"repair": "experts"}, "experts"),
        ({"allocator": "search"}, "search"),
        ({"allocator": "nonsense"}, "expected one of tod, emp"),
        ({"allocator": {"unit": sc.ToD(), "block": "global"}}, "expected two rules in the mapping"),
        ({"allocator": {"unit": sc.ToD(), "expert": sc.ToD()}}, "for units and blocks together"),
        ({"allocator": {"unit": sc.ToD(), "block": sc.Global(), "share": 1.5}}, "share"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sc.SettingError, match=message):
        sc.prune(Chain().eval(), [ROWS], sc.Budget(params=0.75), granularity=BOTH, **options)


def test_signals_come_in_pairs() -> None:
    _, _, graph = traced("chain")
    with pytest.raises(sc.SettingError, match="expected pairs of a signal for units and one for blocks"):
        sc.score(graph, None, ["magnitude"], progress=False)  # type: ignore[arg-type]


def test_a_plan_from_a_file_is_checked(tmp_path: Path) -> None:
    model, inputs, graph = traced("chain")
    plan = drawn(graph, 1)
    (tmp_path / "plan.json").write_text(plan.to_json())
    known = sc.Plan.from_json(tmp_path / "plan.json")
    assert known == plan
    assert sc.verify(model, sc.apply(model, known), known, inputs).proven
    text = json.loads(plan.to_json())
    text["predicted"]["params"] += 1
    with pytest.raises(sc.PlanError, match="expected predicted params of"):
        sc.apply(model, sc.Plan.from_json(json.dumps(text)))
