"""Masks as plans: allocated by any rule, applied, written down, and handed to torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import secateur as sc
from secateur.allocators import EMP, ERK, LAMP, OWL, Budget, Global, Limits, ToD, Uniform
from secateur.allocators.effective_size import effective_size
from secateur.allocators.owl import outliers
from secateur.errors import (
    ArtefactError,
    BudgetError,
    PlanError,
    SettingError,
    UnreachableBudgetError,
    VerificationError,
)
from secateur.targets.weights import MaskPlan
from secateur.targets.weights.apply import apply, check
from secateur.targets.weights.interop import from_torch, is_two_four, to_semi_structured, to_torch
from secateur.targets.weights.pattern import Pattern
from tests.targets.weights.nets import allocate, data, net, score, traced

MODEL = net()
WEIGHTS = traced(MODEL)
SCORES = score(MODEL, data(), ["magnitude", "wanda", "random"])
TOTAL = WEIGHTS.cost().weights
RULES: dict[str, Any] = {
    "uniform": Uniform(),
    "wanda": Uniform(removal="wanda"),
    "random": "random",
    "global": Global(),
    "erk": ERK(),
    "erk capped": ERK(cap=0.6),
    "lamp": LAMP(),
    "owl": OWL(above=2.0),
    "emp model": EMP(scope="model"),
    "emp layer": EMP(),
    "emp row": EMP(scope="row", removal="wanda"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_the_sparsity_is_met_to_a_single_weight(rule: str, sparsity: float) -> None:
    plan = allocate(WEIGHTS, SCORES, RULES[rule], Budget(sparsity=sparsity))
    kept = sum(int(mask.sum()) for mask in plan.masks.values())
    assert kept == TOTAL - int(np.ceil(sparsity * TOTAL - 1e-9))
    again = allocate(WEIGHTS, SCORES, RULES[rule], Budget(sparsity=sparsity))
    assert again.to_json() == plan.to_json()
    if "row" in rule:
        return
    for name, mask in plan.keep.items():  # the lowest of each layer go
        values = SCORES["wanda" if rule == "wanda" else "random" if rule == "random" else "magnitude"][name]
        if not mask.all():
            assert values[~mask].max() <= values[mask].min()


def test_densities_of_erk() -> None:
    plan = allocate(WEIGHTS, SCORES, ERK(), Budget(sparsity=0.6))
    epsilon: Any = plan.settings["epsilon"]
    for group in WEIGHTS.groups:
        density = min(1.0, epsilon * sum(group.shape) / group.size)
        assert 1 - plan.sparsities[group.name] == pytest.approx(density, abs=1.01 / group.size)
    assert max(plan.sparsities.values()) > 0.8 > 0.45 > min(plan.sparsities.values())
    capped = allocate(WEIGHTS, SCORES, ERK(cap=0.5), Budget(sparsity=0.6))
    assert min(capped.sparsities.values()) >= 0.5
    assert capped.sparsity == pytest.approx(plan.sparsity)
    graph = sc.trace(net(), data()[0][0])
    with pytest.raises(SettingError, match=r"ERK: expected weight tensors, .* got the units of 'conv'"):
        ERK().allocate(graph, sc.score(graph, signals="magnitude"), Budget(macs=0.5))


def test_densities_of_owl() -> None:
    rule = OWL(above=1.8, width=0.1)
    plan = allocate(WEIGHTS, SCORES, rule, Budget(sparsity=0.6))
    shares = {g.name: outliers(SCORES["magnitude"][g.name], 1.8) for g in WEIGHTS.groups}
    low, high = min(shares.values()), max(shares.values())
    assert low < high
    t: Any = plan.settings["density"]
    for group in WEIGHTS.groups:
        density = t + 0.2 * (shares[group.name] - low) / (high - low) - 0.1
        assert 1 - plan.sparsities[group.name] == pytest.approx(density, abs=1.01 / group.size)
    assert outliers(np.array([1.0, 1.0, 1.0, 9.0]), 2) == 0.25


def test_emp_of_rows_keeps_each_rows_effective_size() -> None:
    plan = allocate(WEIGHTS, SCORES, EMP(scope="row", removal="wanda"))
    for group in WEIGHTS.groups:
        rows = SCORES["wanda"][group.name].reshape(group.rows)
        for row, kept in zip(rows, plan.masks[group.name].reshape(group.rows), strict=True):
            assert kept.sum() == effective_size(row)
            assert row[kept].min() >= row[~kept].max(initial=0)
    found: Any = plan.certificates["groups"]
    assert all(entry["bound"] <= entry["mass"] <= 1 for entry in found.values())


def test_no_budget_that_is_reached() -> None:
    # One weight of each tensor stays.
    with pytest.raises(UnreachableBudgetError, match=r"Ask for at most sparsity=0\.99") as caught:
        allocate(WEIGHTS, SCORES, "uniform", Budget(sparsity=0.9999))
    least = caught.value.smallest
    assert least == (TOTAL - 4) / TOTAL
    plan = allocate(WEIGHTS, SCORES, "uniform", Budget(sparsity=least))
    assert [int(mask.sum()) for mask in plan.masks.values()] == [1, 1, 1, 1]
    with pytest.raises(BudgetError, match="expected a bound on sparsity, got macs"):
        allocate(WEIGHTS, SCORES, "uniform", Budget(macs=0.5))
    graph = sc.trace(net(), data()[0][0])
    with pytest.raises(BudgetError, match=r"got sparsity\. Use granularity 'weight'"):
        Uniform().allocate(graph, sc.score(graph, signals="magnitude"), Budget(sparsity=0.5))
    bad: Any
    for bad in (0.0, 1.0, 3, "a", -0.1):
        with pytest.raises(BudgetError, match="expected sparsity to be a"):
            Budget(sparsity=bad)


def test_limits() -> None:
    plan = allocate(WEIGHTS, SCORES, "lamp", Budget(sparsity=0.3), Limits(max_ratio=0.6, ignore=("conv.*",)))
    assert "conv.weight" not in plan.masks
    assert max(plan.sparsities.values()) <= 0.6


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_patterns(n: int, m: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 4)).double()
    scores = score(model)
    plan = allocate(traced(model), scores, Pattern(n, m))
    for name, mask in plan.masks.items():
        values = scores["magnitude"][name].reshape(-1, mask[0].size)
        if mask[0].size % m:
            assert mask.all()
            continue
        for row, kept in zip(values, mask.reshape(len(mask), -1), strict=True):
            for k in range(0, len(row), m):
                expected = sorted(range(m), key=lambda i: -row[k + i])[:n]
                assert sorted(np.flatnonzero(kept[k : k + m])) == sorted(expected)
    small = apply(model, plan)
    assert is_two_four(small.get_submodule("2").weight) == (n / m < 0.5 or (n, m) == (2, 4))
    assert not is_two_four(model.get_submodule("2").weight)


def test_patterns_keep_the_lower_index_of_a_tie_and_refuse_budgets() -> None:
    model = nn.Linear(4, 2, bias=False)
    nn.init.ones_(model.weight)
    plan = allocate(traced(model), score(model), Pattern())
    assert plan.masks["weight"].tolist() == [[True, True, False, False]] * 2
    with pytest.raises(SettingError, match="Pattern: expected no budget"):
        allocate(traced(model), score(model), Pattern(), Budget(sparsity=0.5))
    bad: Any
    for bad in ((4, 4), (0, 4), (2.0, 4)):
        with pytest.raises(SettingError, match="Pattern: expected integers 1 <= n < m"):
            Pattern(*bad)


def test_apply_and_check() -> None:
    plan = allocate(WEIGHTS, SCORES, "lamp", Budget(sparsity=0.7))
    before = copy.deepcopy(MODEL.state_dict())
    small = apply(MODEL, plan)
    assert all(torch.equal(t, before[name]) for name, t in MODEL.state_dict().items())
    check(MODEL, small, plan)
    for name, tensor in small.state_dict().items():
        expected = before[name].clone()
        if name in plan.masks:
            expected[torch.tensor(~plan.masks[name])] = 0
        assert torch.equal(tensor, expected)
    small.fc.bias.data[0] += 1e-9
    with pytest.raises(VerificationError, match=r"got a difference in 'fc\.bias' \(1 tensors in all\)"):
        check(MODEL, small, plan)
    with pytest.raises(PlanError, match="expected the model they were made for"):
        apply(nn.Linear(2, 2), plan)


@pytest.mark.parametrize("method", ["bias", "variance", "reconstruct"])
def test_repair_lowers_the_error_and_keeps_zeros(method: str) -> None:
    model, batches = net(), data(5, 20)
    graph = sc.trace(model, batches[0][0])
    plan = allocate(WEIGHTS, SCORES, "lamp", Budget(sparsity=0.6))
    small = apply(model, plan, graph)
    inputs = [(x,) for x, _ in batches]
    repaired = sc.repair(small, model, inputs, method, graph=graph, progress=False)
    before, after = (sc.evaluate(m, inputs, dense=model).loss for m in (small, repaired))
    assert after < before
    for name, mask in plan.masks.items():
        assert not repaired.get_parameter(name)[torch.tensor(~mask)].any()


def test_a_masked_model_is_saved_bit_for_bit(tmp_path: Path) -> None:
    graph = sc.trace(MODEL, data()[0][0])
    small = apply(MODEL, allocate(WEIGHTS, SCORES, "lamp", Budget(sparsity=0.7)), graph)
    sc.save(small, tmp_path)
    again = sc.load(tmp_path, lambda: net(seed=3))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in small.state_dict().items())


def test_a_plan_is_saved_whole(tmp_path: Path) -> None:
    plan = allocate(WEIGHTS, SCORES, EMP(scope="row"), Budget(sparsity=0.7), seed=3)
    again = MaskPlan.load(plan.save(tmp_path / "masks.safetensors"))
    assert again.to_json() == plan.to_json()
    assert again.settings == plan.settings
    assert all(np.array_equal(mask, plan.masks[name]) for name, mask in again.masks.items())
    assert again.masks["conv.weight"].shape == (8, 3, 3, 3)
    size = (tmp_path / "masks.safetensors").stat().st_size
    plan = allocate(WEIGHTS, SCORES, "uniform", Budget(sparsity=0.7))
    assert (
        TOTAL / 8 < plan.save(tmp_path / "b").stat().st_size < TOTAL / 8 + 2500 < size + 2500
    )  # a bit a weight
    with pytest.raises(ArtefactError, match="expected a folder"):
        plan.save(tmp_path / "none" / "b")
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:-3])
    with pytest.raises(ArtefactError, match="damaged"):
        MaskPlan.load(tmp_path / "b")
    with pytest.raises(PlanError, match="expected a boolean mask of 'a', got int64"):
        MaskPlan("f", "own", {"a": np.ones(3, dtype=np.int64)})  # type: ignore[dict-item]
    with pytest.raises(PlanError, match="expected settings that JSON can hold"):
        MaskPlan("f", "own", {}, {"a": float("nan")})
    assert "282 /   942    70.1%" in str(plan)


def test_to_torch_and_back_through_training() -> None:
    plan = allocate(WEIGHTS, SCORES, "lamp", Budget(sparsity=0.7))
    model = to_torch(apply(MODEL, plan), plan).train()
    found = from_torch(model)
    assert found.fingerprint == plan.fingerprint
    assert all(np.array_equal(mask, plan.masks[name]) for name, mask in found.masks.items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for x, y in data(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name in plan.masks:
        torch_prune.remove(model.get_submodule(name.rpartition(".")[0]), "weight")
    for name, mask in plan.masks.items():
        weight = model.get_parameter(name)
        assert not weight[torch.tensor(~mask)].any()
        assert not torch.equal(weight, MODEL.get_parameter(name) * torch.tensor(mask))
    apply(model, plan)  # the same names and shapes as before
    with pytest.raises(
        SettingError, match=r"expected a model that torch\.nn\.utils\.prune has masked, got none"
    ):
        from_torch(model)


def test_single_weights_have_no_curve_of_macs() -> None:
    with pytest.raises(SettingError, match="curve: expected a graph of units or experts, got one of single"):
        LAMP().curve(WEIGHTS, SCORES)  # type: ignore[arg-type]


def test_rules_for_units_are_refused() -> None:
    with pytest.raises(SettingError, match="masks: expected a rule for single weights, got ToD"):
        allocate(WEIGHTS, SCORES, ToD(), Budget(sparsity=0.5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_sparse_formats_need_their_hardware() -> None:
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight[:, ::2] = 0
    with pytest.raises(SettingError, match="expected a model on a CUDA device"):
        to_semi_structured(model)


def test_masks_survive_training() -> None:
    model, batches = net(), data(4, 8)
    graph = sc.trace(model, batches[0][0])
    plan = allocate(WEIGHTS, SCORES, "lamp", Budget(sparsity=0.7))
    small = apply(model, plan, graph)
    tuned = sc.recover(small, model, batches, epochs=2, progress=False)
    for name, mask in plan.masks.items():
        weight = tuned.get_parameter(name)
        assert not weight[torch.tensor(~mask)].any()
        assert not torch.equal(weight, small.get_parameter(name))


class Reader(nn.Module):
    """Most of its parameters are those of an LSTM and of an embedding, which no mask touches."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.out = (
            nn.Embedding(9, 6),
            nn.LSTM(6, 12, batch_first=True),
            nn.Linear(12, 4),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.rnn(self.words(ids))[0][:, -1])
        return found


def test_which_share_of_all_parameters_is_zero_is_said_beside_that_of_the_maskable_weights() -> None:
    """In the plan, the record's note and the report; what is left alone is named."""
    model = Reader()
    batches = [(torch.randint(9, (8, 5)), torch.arange(8) % 4)] * 6
    result = sc.prune(model, batches, Budget(sparsity=0.75), granularity="weight", progress=False)
    total = sum(p.numel() for p in model.parameters())
    assert result.plan.parameters == total
    share = result.plan.removed / total
    assert (result.plan.removed, round(share, 3)) == (36, 0.034)
    told = (
        f"75.00% of the weights of linear layers and convolutions are zero, {share:.2%} of all parameters; "
        "left alone: rnn (LSTM), words (Embedding)"
    )
    assert result.plan.sentence() == told
    assert told in sc.record_of(result.model).note
    shown = " ".join(str(result.report).split())
    assert told in shown
    assert "at least 75 % of the weights of linear layers and convolutions zero" in shown
    table = str(result.plan).splitlines()
    assert table[-1] == "left alone: rnn (LSTM), words (Embedding)"
    assert table[-2].split() == ["all", "parameters", f"{total - 36:,}", "/", f"{total:,}", f"{share:.1%}"]


def test_a_tied_or_masked_parameter_counts_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    plan = allocate(traced(model), score(model, [], ["magnitude"]), "uniform", Budget(sparsity=0.5))
    assert (plan.parameters, dict(plan.alone)) == (sum(p.numel() for p in model.parameters()), {})
    assert MaskPlan.load(plan.save(tmp_path / "plan.safetensors")).sentence() == plan.sentence()
    older = MaskPlan(plan.fingerprint, plan.allocator, plan.masks)
    assert older.sentence() == "50.00% of the weights of linear layers and convolutions are zero"
    assert "all parameters" not in str(older)
