from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.integrations import GradualPruner, Schedule
from secateur.integrations.shapes import rounds_of
from tests.graph.test_trace import assert_same, state_of
from tests.integrations.training import a_pruner, batches, macs, network, step


def train(model: nn.Module, pruner: GradualPruner, steps: int, **adam: Any) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), 0.01, **adam)
    losses = []
    for number in range(1, steps + 1):
        losses.append(step(model, optimizer, batches()[number % 4]))
        pruner.advance(model, optimizer, step=number)
    return losses


def test_rounds_come_when_they_are_due_and_meet_their_budgets() -> None:
    model = network()
    dense = sc.trace(model, batches()[0][0]).cost()
    pruner = a_pruner(rounds=3, end=6)
    made = sc.record_of
    objects = [*model.modules()]
    losses = train(model, pruner, 9)
    assert [done.step for done in pruner.rounds] == [2, 4, 6]
    for done in pruner.rounds:
        target = pruner.schedule.target(done.number, dense).macs
        assert target is not None
        assert done.after.macs <= target < done.before.macs
    assert pruner.rounds[-1].after.macs == macs(model)
    assert [a is b for a, b in zip(objects, model.modules(), strict=True)] == [True] * len(objects)
    assert model.training
    assert losses[-1] < losses[0]
    plan = made(model).plan
    assert plan.settings["rounds"] == 3
    assert (plan.dense.macs, plan.predicted.macs) == (dense.macs, macs(model))
    convolution, norm, hidden = model[0], model[1], model[5]
    assert convolution.out_channels == norm.num_features == len(norm.running_mean) < 8
    assert hidden.in_features == 4 * convolution.out_channels
    assert "round 3 after step 6: " in str(pruner.rounds[-1])


def test_a_round_is_done_once_however_often_it_is_asked_for() -> None:
    model, pruner = network(), a_pruner(rounds=2, end=4)
    assert pruner.advance(model, step=1) is None
    assert pruner.advance(model, step=2) is not None
    assert pruner.advance(model, step=2) is None
    assert a_pruner(rounds=2, end=4).advance(model, step=3) is None  # another pruner, as after a restart
    last = pruner.advance(model, step=100)
    assert last is not None
    assert last.number == rounds_of(model) == 2


def test_rounds_that_were_missed_are_one() -> None:
    model, pruner = network(), a_pruner(rounds=4, end=4)
    done = pruner.advance(model, step=3)
    assert done is not None
    assert done.number == 3
    assert pruner.advance(model, step=3) is None


def test_a_model_that_is_small_enough_is_left_as_it_is() -> None:
    model = network()
    pruner = GradualPruner(Schedule(sc.Budget(macs=macs(model) * 2), 0, 2, rounds=2), batches(), "uniform")
    before = state_of(model)
    done = pruner.advance(model, step=1)
    assert done is not None
    assert done.before == done.after
    assert all(torch.equal(v, before["values"][n]) for n, v in model.state_dict().items())
    assert pruner.advance(model, step=1) is None


def test_it_computes_what_the_masked_model_computes() -> None:
    """One round without repair: the model, in place, against masks on the model as training left it."""
    model = network().double().eval()
    data = [(x.double(), y) for x, y in batches()]
    before = copy.deepcopy(model)
    pruner = GradualPruner(Schedule(sc.Budget(macs=0.5), 0, 1, rounds=1), data, "uniform")
    done = pruner.advance(model, step=1)
    assert done is not None
    expected = sc.apply(before, done.plan, "masked")(data[0][0])
    torch.testing.assert_close(model(data[0][0]), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(before(data[0][0]), expected)
    sc.verify(before, model, sc.record_of(model).plan, data[0][0])


def test_repair_helps() -> None:
    trained = network()
    optimizer = torch.optim.Adam(trained.parameters(), 0.01)
    for number in range(40):
        step(trained, optimizer, batches()[number % 4])
    results = {}
    for repair in (None, "reconstruct"):
        model = copy.deepcopy(trained).eval()
        a_pruner(rounds=1, end=1, macs=0.3, repair=repair).advance(model, step=1)
        results[repair] = sc.evaluate(model, batches()).loss
    assert results["reconstruct"] < results[None]


def test_what_comes_out_is_saved_and_loaded_as_any_pruned_model(tmp_path: Any) -> None:
    model = network()
    train(model, a_pruner(), 5)
    sc.save(model, tmp_path)
    again = sc.load(tmp_path, network)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    x = batches()[0][0]
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_model_that_was_pruned_before() -> None:
    graph = sc.trace(network(), batches()[0][0])
    scores = sc.score(graph, None, "magnitude")
    plan = sc.Uniform(removal="magnitude").allocate(graph, scores, sc.Budget(macs=0.8))
    model = sc.apply(network(), plan, "module")
    dense = plan.dense.macs
    a_pruner(rounds=2, end=2).advance(model, step=2)
    assert macs(model) <= 0.5 * dense
    assert sc.record_of(model).plan.dense.macs == dense
    masked = sc.apply(network(), plan, "masked")
    with pytest.raises(sc.ArtefactError, match="one of form 'module', got form 'masked'"):
        a_pruner().advance(masked, step=2)


def test_heads_go_while_training() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(64, 3))
    labels = torch.arange(12) % 3
    data = [(torch.randn(12, 4, 6) + labels[:, None, None], labels)]
    attention = model[1].layers[0].self_attn
    seen: list[tuple[int, ...]] = []
    attention.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = GradualPruner(Schedule(sc.Budget(macs=0.5), 0, 4, rounds=2), data, "uniform")
    losses = []
    for number in range(1, 9):
        losses.append(step(model, optimizer, data[0]))
        pruner.advance(model, optimizer, step=number)
    assert model[1].layers[0].self_attn is attention
    assert attention.num_heads < 4
    assert optimizer.state[attention.in_proj_weight]["exp_avg"].shape == (12 * attention.num_heads, 16)
    assert losses[-1] < losses[0]
    before = len(seen)
    model(data[0][0])
    assert len(seen) == before + 1


def test_groups_that_a_module_cannot_express_stay_whole_and_others_pay() -> None:
    class Fixed(nn.Module):
        """Its forward insists on the width of one layer."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 12), nn.Linear(12, 20), nn.Linear(20, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x))
            if x.shape[1] != 12:
                raise ValueError("twelve")
            return self.third(torch.relu(self.second(x)))

    torch.manual_seed(0)
    model = Fixed()
    data = [(torch.randn(12, 4), torch.arange(12) % 3)]
    dense = sc.trace(model, data[0][0]).cost().macs
    pruner = GradualPruner(Schedule(sc.Budget(macs=0.6), 0, 2, rounds=2), data, "uniform")
    for number in (1, 2):
        pruner.advance(model, step=number)
    assert model.first.out_features == 12
    assert model.second.out_features < 20
    assert sc.trace(model, data[0][0]).cost().macs <= 0.6 * dense


def test_errors_leave_the_model_as_it_was() -> None:
    model = network()
    before = state_of(model)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(sc.UnreachableBudgetError):
        a_pruner(rounds=1, end=1, macs=0.0001).advance(model, optimizer, step=1)
    assert_same(before, state_of(model))
    with pytest.raises(sc.SettingError, match=r"start=0\.1 and end=0\.5 are shares, got None"):
        GradualPruner(Schedule(sc.Budget(macs=0.5), 0.1, 0.5, rounds=1), batches()).advance(model, step=1)
    with pytest.raises(sc.SettingError, match="expected a Schedule, got Budget"):
        GradualPruner(sc.Budget(macs=0.5), batches())  # type: ignore[arg-type]
    with pytest.raises(sc.SettingError, match="allocator"):
        GradualPruner(a_pruner().schedule, batches(), "best")
    with pytest.raises(sc.SettingError, match="repair"):
        GradualPruner(a_pruner().schedule, batches(), repair="magic")


def test_under_torch_compile() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(model.parameters())
    pruner = a_pruner(rounds=2, end=4)
    for number in range(1, 6):
        step(compiled, optimizer, batches()[0])
        pruner.advance(compiled, optimizer, step=number)
    assert len(pruner.rounds) == 2
    x = batches()[1][0]
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x))
