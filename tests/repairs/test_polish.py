"""`polish`: the loss as the formula says, and what a repair that trains must leave alone."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Batch, Calibration
from secateur.measure.divergence import divergence
from secateur.repairs.features import features, outputs
from secateur.repairs.judging import Judge
from secateur.repairs.methods import Work, quick, resolve
from secateur.repairs.polish import Distance, Polish, one_cycle
from secateur.stream.calls import ProgramCalls
from secateur.targets.units.copying import duplicate
from tests.graph.test_trace import assert_same, state_of
from tests.helpers.lengths import batches, network
from tests.helpers.models import TOPOLOGIES, build
from tests.repairs.nets import inputs, topology, topology_data
from tests.signals.processes import in_processes
from tests.targets.units.plans import random_plan

FORMS = ("module", "graph", "masked")
BOTH = ["reconstruct", Polish(passes=20)]


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(12), nn.LayerNorm(12)])
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 12] to the same."""
        q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Ids to one row of 5 numbers; a table of positions is the same in every network."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.register_buffer("places", torch.linspace(-1, 1, 7)[:, None])
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [batch, 7] to [batch, 5]."""
        places = self.places.sin()
        return self.head((self.blocks(self.words(ids) + places) * places.cos()).mean(1))


def learnt(model: nn.Module, data: list[Any]) -> nn.Module:
    """The model after a few steps towards random labels, in evaluation mode."""
    steps = torch.optim.Adam(model.train().parameters(), 0.01)
    for (x,) in data * 5:
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), x.reshape(len(x), -1).sum(1).long() % 5).backward()
        steps.step()
    model.zero_grad()
    return model.eval()


def data_for(name: str) -> list[tuple[Tensor]]:
    """Five batches of 16 samples."""
    generator = torch.Generator().manual_seed(3)
    if name == "transformer":
        return [(torch.randint(20, (16, 7), generator=generator),) for _ in range(5)]
    return inputs(3, 8, 8, batches=5)  # type: ignore[return-value]


@functools.cache
def trained(name: str) -> nn.Module:
    """A small network that was trained, in float64."""
    torch.manual_seed(0)
    model = Transformer().double() if name == "transformer" else build("residual")
    return learnt(model, data_for(name))


def small_of(name: str, form: str = "module", share: float = 0.25) -> tuple[nn.Module, sc.Graph, nn.Module]:
    """A trained network, its trace, and what is left of it."""
    dense = trained(name)
    graph = sc.trace(dense, data_for(name)[0][0][:2])
    return dense, graph, sc.apply(dense, random_plan(graph, share), form, graph=graph)  # type: ignore[arg-type]


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 0.7), st.floats(0, 9), st.sampled_from(FORMS))
def test_the_loss_is_what_loops_over_samples_and_units_give(
    seed: int, share: float, weight: float, form: str
) -> None:
    torch.manual_seed(seed)
    dense = chain().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    graph = sc.trace(dense, x)
    plan = random_plan(graph, share, seed)
    small = sc.apply(dense, plan, form, graph=graph)  # type: ignore[arg-type]
    got = Distance(graph, small, weight)(Batch.of((x,)))

    def apart(ours: Tensor, theirs: Tensor) -> float:
        error = scale = 0.0
        for mine, yours in zip(ours.tolist(), theirs.tolist(), strict=True):
            for a, b in zip(mine, yours, strict=True):
                error, scale = error + (a - b) ** 2, scale + b**2
        return error / scale

    kept = {g.name: [k for k in range(g.size) if k not in g.removed] for g in plan.groups}
    a, b, between = x, x, []
    for k, (mine, layer) in enumerate(zip(sc.apply(dense, plan, "module", graph=graph), dense, strict=True)):
        a, b = mine(a), layer(b)
        if k in (1, 3):
            between.append(apart(a, b[:, kept[str(k - 1)]]))
    wanted = apart(a, b) + weight * sum(between) / 2
    assert float(got.detach()) == pytest.approx(wanted, rel=1e-9)
    assert got.requires_grad


def test_with_scores_the_outputs_count_by_the_divergence_of_their_classes() -> None:
    dense, x = chain().eval(), torch.randn(5, 6, dtype=torch.float64)
    graph = sc.trace(dense, x)
    small = sc.apply(dense, random_plan(graph, 0.3), graph=graph)
    by_scores, plain, between = (
        float(Distance(graph, small, weight, by_scores=by)(Batch.of((x,))).detach())
        for weight, by in ((2.0, True), (0.0, True), (2.0, False))
    )
    with torch.no_grad():
        a, b = small(x), dense(x)
    expected = 0.0
    for mine, yours in zip(a.tolist(), b.tolist(), strict=True):
        likely = [math.exp(v) / sum(map(math.exp, yours)) for v in yours]
        expected += sum(
            q * math.log(q / (math.exp(v) / sum(map(math.exp, mine)))) / 5
            for q, v in zip(likely, mine, strict=True)
        )
    assert plain == pytest.approx(expected, rel=1e-9)
    outputs_alone = float((a - b).square().sum() / b.square().sum())
    assert by_scores - plain == pytest.approx(between - outputs_alone, rel=1e-9)


def test_a_shift_of_all_scores_and_an_excluded_class_are_no_divergence() -> None:
    wanted = torch.tensor([[1.0, 2.0, -math.inf], [0.5, 0.0, 3.0]])
    same = divergence(wanted + torch.tensor([[3.0], [-7.0]]), wanted)
    torch.testing.assert_close(same, torch.zeros(2), atol=1e-6, rtol=0)
    got = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 3.0]], requires_grad=True)
    found = divergence(got, wanted)
    # All that the classes lose to one that the dense model excludes.
    assert float(found[0].detach()) == pytest.approx(
        math.log((math.e + math.e**2 + 1) / (math.e + math.e**2))
    )
    found.sum().backward()
    assert bool(torch.isfinite(got.grad).all())  # type: ignore[arg-type]
    assert divergence(got.bfloat16(), wanted.bfloat16()).dtype == torch.float32


def test_language_models_are_trained_and_judged_by_the_divergence_of_their_words() -> None:
    model = network("language")
    data = [batch["ids"] for batch in batches("language", 12)] * 2
    read = Calibration.of(data, model=model)
    graph = sc.trace(model, data[0])
    small = sc.apply(model, random_plan(graph, 0.4), graph=graph)
    assert Polish().with_defaults(graph).divergence
    assert not Polish(divergence=False).with_defaults(graph).divergence
    assert not Polish().with_defaults(small_of("cnn")[1]).divergence  # pictures
    assert (
        not Polish().with_defaults(small_of("transformer")[1]).divergence
    )  # ids, and an output without a name
    found = sc.repair(small, model, data, ["reconstruct", Polish(passes=10)], graph=graph, progress=False)
    tried = sc.record_of(found).repairs
    assert [t["measure"] for t in tried] == ["divergence from dense"] * 2
    assert tried[1]["kept"]
    assert tried[1]["after"] < tried[1]["before"] == tried[0]["after"]
    judge = Judge(model, read.split(5)[1], by_scores=True)
    assert float(judge(found).mean()) == pytest.approx(tried[1]["after"])
    assert float(judge(model).mean()) == pytest.approx(0, abs=1e-12)
    plain = sc.repair(small, model, data, Polish(passes=1, divergence=False), graph=graph, progress=False)
    assert sc.record_of(plain).repairs[0]["measure"] == "distance to dense"


def test_products_in_bfloat16_leave_parameters_and_the_loss_as_they_are() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(40, 6)
    graph = sc.trace(net, x)
    small = sc.apply(net, random_plan(graph, 0.4), graph=graph)
    losses = [Distance(graph, small, 1.0, mixed=mixed)(Batch.of((x,))) for mixed in (False, True)]
    exact, rounded = (float(loss.detach()) for loss in losses)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)
    assert losses[1].dtype == torch.float32
    found = sc.repair(
        small, net, list(x.split(8)), Polish(passes=10, mixed=True), graph=graph, progress=False
    )
    assert sc.record_of(found).repairs[0]["kept"]
    assert {p.dtype for p in found.parameters()} == {torch.float32}


def names_of(model: nn.Module, example: Any) -> list[tuple[int, ...]]:
    program = ProgramCalls(sc.trace(model, example))
    return [tuple(map(int, node.meta["val"].shape[1:])) for node in features(program)]


def test_features_lie_between_blocks() -> None:
    # Two blocks of two additions each, after what goes into the first and before the classifier.
    assert names_of(trained("transformer"), data_for("transformer")[0][0][:2]) == [*[(7, 12)] * 5, (12,)]
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(*wide, nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert names_of(model, torch.zeros(2, 3, 8, 8)) == [(36,), (8,)]
    program = ProgramCalls(sc.trace(build("dict_output"), TOPOLOGIES["dict_output"].inputs(2, torch.float64)))
    assert len(outputs(program)) == 2
    assert not {*features(program)} & {*outputs(program)}


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_the_distance_falls_below_what_the_closed_form_leaves(name: str) -> None:
    dense, graph, small = small_of(name)
    data = data_for(name)
    before, teacher, random = state_of(small), state_of(dense), torch.get_rng_state()
    found = sc.repair(small, dense, data, BOTH, graph=graph)
    closed, polished = sc.record_of(found).repairs
    assert polished["kept"]
    assert polished["before"] == closed["after"]
    assert polished["after"] < polished["before"]
    assert 13 < polished["passes"] <= 20  # it may end early, but not in the first two thirds
    judge = Judge(dense, Calibration.of(data[4:]))
    assert float(judge(found).mean()) == pytest.approx(polished["after"])
    assert_same(before, state_of(small))
    assert_same(teacher, state_of(dense))
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for m in (found, small, dense) for p in m.parameters())
    assert all(p.requires_grad for p in found.parameters())
    again = sc.repair(small, dense, data, BOTH, graph=graph)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in found.state_dict().items())


def test_all_forms_learn_the_same() -> None:
    found = []
    for form in FORMS:
        dense, graph, small = small_of("cnn", form)
        found.append(sc.repair(small, dense, data_for("cnn"), Polish(passes=3), graph=graph))
    x = data_for("cnn")[0][0]
    with torch.no_grad():
        module, *others = [m(x) for m in found]
    for other in others:
        torch.testing.assert_close(other, module, rtol=1e-7, atol=1e-9)


def test_zeros_of_a_mask_and_statistics_of_batch_norms_stay() -> None:
    dense, graph, small = small_of("cnn", "masked")
    polished = sc.repair(small, dense, data_for("cnn"), Polish(passes=3), graph=graph)
    moved, before = dict(polished.named_parameters()), dict(small.named_parameters())
    zeros = {k: v == 0 for k, v in before.items() if v.ndim > 1}
    assert any(z.any() for z in zeros.values())
    for name, zero in zeros.items():
        assert bool((moved[name][zero] == 0).all())
        assert not torch.equal(moved[name], before[name])
    assert len(dict(small.named_buffers())) > 0
    for name, buffer in small.named_buffers():
        assert torch.equal(dict(polished.named_buffers())[name], buffer)


def test_single_weights_stay_masked() -> None:
    dense = trained("cnn")
    result = sc.prune(
        dense, data_for("cnn"), sc.Budget(sparsity=0.6), "uniform", "weight",
        repair=["variance", Polish(passes=4)], progress=False,
    )  # fmt: skip
    tried = result.report.repairs[-1]
    assert tried["kept"]
    assert tried["after"] < tried["before"]
    masks = result.plan.masks  # type: ignore[union-attr]
    for name, keep in masks.items():
        weight = result.model.get_parameter(name)
        assert bool((weight[~torch.tensor(keep).reshape(weight.shape)] == 0).all())


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_steps_that_make_it_worse_are_undone(rate: float) -> None:
    dense, graph, small = small_of("cnn")
    found = sc.repair(small, dense, data_for("cnn"), Polish(passes=2, learning_rate=rate), graph=graph)
    (tried,) = sc.record_of(found).repairs
    assert tried["after"] == tried["before"]
    assert not tried["kept"]
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in small.state_dict().items())


class Scripted(Judge):
    """Says what it is told to, and notes the states that it was shown."""

    def __init__(self, errors: list[float], dense: nn.Module, data: Calibration) -> None:
        super().__init__(dense, data)
        self.errors, self.states = errors, list[dict[str, Tensor]]()

    def __call__(self, model: nn.Module) -> Any:
        self.states.append(copied(model))
        return np.array([self.errors[len(self.states) - 1]])


@pytest.mark.parametrize(
    ("errors", "begun"), [([5, 4, 1, 3, 2, 9, 9, 9, 9, 9], 7), ([5, 4, 3, 2, 6, 6, 1, 1, 9, 9], 9)]
)
def test_the_best_state_wins_and_nothing_new_for_long_ends_it(errors: list[float], begun: int) -> None:
    dense, graph, small = small_of("cnn")
    data = Calibration.of(data_for("cnn"))
    model, judge = sc.repair(small, dense, data_for("cnn"), None), Scripted(errors, dense, data)
    notes = Polish(passes=9).run(model, Work(lambda: graph, data, judge=judge))
    assert notes is not None
    assert notes["passes"] == begun
    assert len(judge.states) == 1 + begun
    best = judge.states[errors.index(1)]
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())
    assert any(not torch.equal(v, judge.states[-1][k]) for k, v in model.state_dict().items())


def test_training_that_leads_astray_goes_on_from_the_best_state_with_smaller_steps() -> None:
    dense, graph, small = small_of("cnn")
    data, moved = Calibration.of(data_for("cnn")), []
    for third in (1.2, 1.3):
        model = sc.repair(small, dense, data_for("cnn"), None)
        judge = Scripted([2, 1, third, 9], dense, data)
        Polish(passes=3).run(model, Work(lambda: graph, data, judge=judge))
        best = judge.states[1]
        moved.append([sum(float((s[k] - best[k]).square().sum()) for k in s) for s in judge.states])
    plain, back = moved
    assert plain[:3] == back[:3]
    assert back[3] < 0.5 * plain[3]


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_comes_nearer(name: str) -> None:
    net, graph, shared = topology(name, "graph")
    small = duplicate(shared)
    data = Calibration.of(topology_data(name), model=net)
    judge = Judge(net, data)
    before = float(judge(small).mean())
    assert Polish(passes=4, batch=8).run(small, Work(lambda: graph, data, judge=judge)) is not None
    assert float(judge(small).mean()) < before


@pytest.mark.parametrize("name", ["padded", "pictures", "language"])
def test_batches_of_any_size(name: str) -> None:
    model, data = network(name), batches(name)
    read = Calibration.of(data, model=model)
    graph = sc.trace(model, read.first().inputs)
    small = sc.apply(model, random_plan(graph, 0.3), graph=graph)
    judge = Judge(model, read)
    before = float(judge(small).mean())
    assert Polish(passes=4).run(small, Work(lambda: graph, read, judge=judge)) is not None
    assert float(judge(small).mean()) < before


def test_labels_are_not_read_and_a_limit_of_time_ends_it() -> None:
    dense, graph, small = small_of("cnn")
    plain = data_for("cnn")
    labelled = [(x, torch.full((len(x),), 99)) for (x,) in plain]
    found = [sc.repair(small, dense, d, Polish(passes=2), graph=graph) for d in (plain, labelled)]
    assert all(map(torch.equal, *(m.state_dict().values() for m in found)))
    short = sc.repair(small, dense, plain, Polish(minutes=1e-9), graph=graph)
    assert sc.record_of(short).repairs[0]["passes"] == 1


def test_each_pass_shows_every_sample_once_in_another_view() -> None:
    dense, graph, small = small_of("cnn")
    images = [torch.randn(8, 3, 8, 8, dtype=torch.float64) for _ in range(6)]
    data = Calibration.of(images, views=3).fresh()
    found = [[b.args[0] for b in replace(data, seed=seed)] for seed in (0, 0, 1, 3)]
    first, again, second, fourth = found
    assert [len(x) for x in first] == [8] * 6
    assert all(map(torch.equal, first, again))
    # In turn: as it is, mirrored, cropped; three passes later the same, but for other crops.
    assert torch.equal(first[0], images[0])
    assert torch.equal(first[1], images[1].flip(-1))
    assert torch.equal(second[0], images[0].flip(-1))
    assert [torch.equal(a, b) for a, b in zip(first, fourth, strict=True)] == [True, True, False] * 2
    changed = sc.repair(small, dense, Calibration.of(images, views=3), Polish(passes=2), graph=graph)
    as_they_are = sc.repair(small, dense, images, Polish(passes=2), graph=graph)
    assert any(not torch.equal(v, as_they_are.state_dict()[k]) for k, v in changed.state_dict().items())


def test_candidates_and_rounds_are_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Polish] = []
    run = Polish.run

    def noted(self: Polish, small: nn.Module, work: Work) -> Any:
        runs.append(self)
        return run(self, small, work)

    monkeypatch.setattr(Polish, "run", noted)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [(torch.randn(20, 6), torch.arange(20) % 3) for _ in range(5)]
    rules = sc.Auto({"uniform": sc.Uniform(), "global": sc.Global()})
    for repair in ("polish", ["reconstruct", "polish"]):
        result = sc.prune(
            net, data, sc.Budget(macs=0.5), rules, repair=repair, steps=2, measure_latency=False,
            progress=False,
        )  # fmt: skip
        assert result.report.asked["repair"] == repair
    assert len(runs) == 2
    sc.prune(net, data, sc.Budget(macs=0.5), rules, measure_latency=False, progress=False)
    assert len(runs) == 2
    assert quick(["reconstruct", Polish()]) == ["reconstruct"]
    assert quick("polish") is None
    assert [m.name for m in resolve(["bias", Polish(passes=2)])[0]] == ["bias", "polish"]


def test_what_it_cannot_train_is_refused_in_words() -> None:
    dense, _, small = small_of("cnn")
    half = [(x.bfloat16(),) for (x,) in data_for("cnn")]
    model = build("residual").bfloat16()
    graph = sc.trace(model, half[0][0][:2])
    found = sc.repair(sc.apply(model, random_plan(graph, 0.3), graph=graph), model, half, "polish")
    (tried,) = sc.record_of(found).repairs
    assert "expected parameters in float32 or float64, got torch.bfloat16" in tried["why"]
    with pytest.raises(sc.SettingError, match="expected None, 'auto' or names among"):
        sc.repair(small, dense, data_for("cnn"), 3)  # type: ignore[arg-type]


def test_one_cycle_rises_and_falls() -> None:
    found = [one_cycle(k / 20) for k in range(21)]
    top = found.index(max(found))
    assert found[top] == 1
    assert found == [*sorted(found[: top + 1]), *sorted(found[top + 1 :], reverse=True)]
    assert 0 < found[0] < 0.1
    assert found[-1] == pytest.approx(0, abs=1e-12)


def polished_here(_: int) -> dict[str, Any]:
    dense, graph, small = small_of("cnn")
    found = sc.repair(small, dense, data_for("cnn"), Polish(passes=3, batch=16), graph=graph, progress=False)
    return {name: tensor.numpy() for name, tensor in found.state_dict().items()}


@pytest.mark.slow
def test_two_processes_average_their_gradients() -> None:
    first, second = in_processes(polished_here, 2, 0)
    alone = polished_here(0)
    assert all(np.array_equal(v, second[k]) for k, v in first.items())
    assert any(not np.array_equal(v, alone[k]) for k, v in first.items())
    dense, _, small = small_of("cnn")
    judge = Judge(dense, Calibration.of(data_for("cnn")[4:]))
    found = sc.repair(small, dense, data_for("cnn"), None)
    found.load_state_dict({name: torch.tensor(value) for name, value in first.items()})
    assert float(judge(found).mean()) < float(judge(small).mean())


@pytest.mark.parametrize(
    "wrong",
    [
        {"passes": 0},
        {"passes": 1.5},
        {"passes": "2"},
        {"passes": True},
        {"minutes": 0},
        {"minutes": math.inf},
        {"batch": 0},
        {"batch": 2.5},
        {"learning_rate": 0},
        {"learning_rate": math.nan},
        {"features": -1},
        {"features": math.inf},
        {"divergence": 1},
        {"mixed": None},
    ],
)
def test_settings_of_another_kind_are_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(sc.SettingError, match=f"polish: expected {next(iter(wrong))} of"):
        Polish(**wrong)


def test_outputs_without_a_slope_are_refused() -> None:
    class Labels(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    net = Labels(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [torch.randn(20, 4) for _ in range(4)]
    small = sc.apply(net, random_plan(sc.trace(net, data[0]), 0.3))
    (tried,) = sc.record_of(sc.repair(small, net, data, "polish", progress=False)).repairs
    assert "polish: expected outputs that are floating-point numbers" in tried["why"]


def test_a_divergence_needs_scores() -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    net = Two(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [torch.randn(20, 4) for _ in range(4)]
    graph = sc.trace(net, data[0])
    small = sc.apply(net, random_plan(graph, 0.3), graph=graph)
    with pytest.raises(sc.CalibrationError, match="polish: expected one output, or one called logits"):
        sc.repair(small, net, data, Polish(divergence=True), graph=graph, progress=False)
    with pytest.raises(sc.SettingError, match="polish: expected one output, or one called logits"):
        Distance(graph, small, 0.0, by_scores=True)
