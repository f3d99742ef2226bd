from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

import secateur as sc
from secateur.common.mapped import empty_file, is_mapped
from secateur.errors import CalibrationError, ScoreError, SettingError
from secateur.graph.groups import Group, Site
from secateur.graph.trace import trace
from secateur.signals import Wasserstein, score
from secateur.signals.by_unit import traced_map
from secateur.signals.signal import Context, Step, Tally
from secateur.signals.units import wasserstein
from secateur.signals.units.wasserstein import largest_distance
from tests.helpers.models import build
from tests.signals import reference
from tests.signals.data import labelled


@pytest.mark.parametrize("name", ["residual", "plain", "gated", "mlp", "channels_last", "conv1d"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_formula(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, data = build(name, dtype), labelled(name, dtype=dtype)
    graph = trace(model, data[0][0])
    signal = Wasserstein(projections=5, per_class=3)
    scores = score(graph, data, signal, seed=3)["wasserstein"]
    for group in graph.groups:
        expected = reference.wasserstein(model, group, data, projections=5, per_class=3, seed=3)
        scale = max(1.0, expected.max())
        np.testing.assert_allclose(scores[group.name], expected, rtol=tolerance, atol=tolerance * scale)


def test_the_reference_can_tell_a_difference() -> None:
    model, data = build("mlp"), labelled("mlp")
    group = trace(model, data[0][0]).groups[0]
    few = reference.wasserstein(model, group, data, per_class=2)
    assert not np.allclose(few, reference.wasserstein(model, group, data, per_class=3))


classes = st.lists(st.integers(1, 7), min_size=2, max_size=5)


@given(counts=classes, entries=st.integers(1, 3), projections=st.integers(1, 3), seed=st.integers(0, 9))
def test_largest_distance_equals_scipy(counts: list[int], entries: int, projections: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    x = rng.integers(-3, 4, (len(labels), entries, projections)) / 2.0  # with ties
    expected = np.zeros(entries)
    for e in range(entries):
        for a in range(len(counts)):
            for b in range(a):
                pairs = [
                    wasserstein_distance(x[labels == a, e, p], x[labels == b, e, p])
                    for p in range(projections)
                ]
                expected[e] = max(expected[e], np.mean(pairs))
    np.testing.assert_allclose(largest_distance([torch.tensor(x)], labels), expected, rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = torch.randn(20, 11, 3), np.arange(20) % 3
    whole = largest_distance([x], labels)
    # By module object: `secateur.score` is also the name of a function.
    monkeypatch.setattr(sys.modules[largest_distance.__module__], "_CHUNK", 100)
    np.testing.assert_array_equal(largest_distance(x.split(7), labels), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_lies_in_files_changes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("residual", dtype), labelled("residual", dtype=dtype)
    graph = trace(model, data[0][0])
    expected = score(graph, data, "wasserstein")["wasserstein"]
    made = []

    def noted(size: int, dtype: torch.dtype) -> Tensor:
        made.append(empty_file(size, dtype))
        return made[-1]

    monkeypatch.setattr(wasserstein, "empty_file", noted)
    monkeypatch.setattr(wasserstein, "HELD_BYTES", 5000)
    monkeypatch.setattr(wasserstein, "_BLOCK", 4000)
    monkeypatch.setattr(wasserstein, "_READ", 1000)
    found = score(graph, data, "wasserstein")["wasserstein"]
    assert len(made) > 2
    assert all(is_mapped(file) for file in made)
    for name, vector in expected.items():
        np.testing.assert_array_equal(found[name], vector)


def test_precise_where_the_offset_is_large() -> None:
    x = torch.tensor([1000.0, 1000.5, 1001.0, 1001.5]).reshape(4, 1, 1)
    assert largest_distance([x], np.array([0, 0, 1, 1]))[0] == 1.0


def test_one_number_a_sample_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
    x = torch.tensor([[0.0, 5.0], [2.0, 5.0], [7.0, 5.0]], dtype=torch.float64)
    graph = trace(net, x)
    # Class 0 is {0, 2} and class 1 is {7}: mean |difference| = (7 + 5) / 2. The other unit never varies.
    found = score(graph, [(x, torch.tensor([0, 0, 1]))], "wasserstein")["wasserstein"]["0"]
    np.testing.assert_allclose(found, [6.0, 0.0])


def test_only_the_first_samples_of_a_class_count() -> None:
    model, data = build("mlp"), labelled("mlp", (8, 8))
    graph = trace(model, data[0][0])
    labels = torch.tensor([0, 1] * 4)
    repeated = [(data[0][0], labels), (data[1][0] * 100, labels)]
    few, first = (score(graph, d, Wasserstein(per_class=4))["wasserstein"] for d in (repeated, repeated[:1]))
    for group in graph.groups:
        np.testing.assert_array_equal(few[group.name], first[group.name])


def test_batches_may_be_cut_anyhow() -> None:
    model, data = build("plain"), labelled("plain", (20,))
    graph = trace(model, data[0][0])
    (x, y), signal = data[0], Wasserstein(per_class=3)
    whole = score(graph, data, signal)["wasserstein"]
    cut = score(graph, list(zip(x.split(7), y.split(7), strict=True)), signal)["wasserstein"]
    for group in graph.groups:
        np.testing.assert_allclose(cut[group.name], whole[group.name], rtol=1e-10)


@pytest.mark.parametrize("counts", [[4] * 80, [1 + k % 5 for k in range(90)]])
def test_many_classes_equal_all_pairs(counts: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    x = torch.randn(len(labels), 3, 2, dtype=torch.float64) + torch.tensor(labels % 7)[:, None, None] / 3
    expected = np.zeros(3)
    for a, b in combinations(range(len(counts)), 2):
        left, right = x[labels == a].numpy(), x[labels == b].numpy()
        pair = [
            np.mean([wasserstein_distance(left[:, e, p], right[:, e, p]) for p in range(2)]) for e in range(3)
        ]
        expected = np.maximum(expected, pair)
    np.testing.assert_allclose(largest_distance([x], labels), expected, rtol=1e-12)


SIZES, PER_CLASS = (5, 3, 8, 1, 6, 4, 7), 4
Recorded = tuple[Step, list[torch.Tensor]]


class _Run:
    """A tally that is fed batches of recorded labels and activations, as the pass would."""

    def __init__(self) -> None:
        model, (inputs, _) = build("plain"), labelled("plain")[0]
        self.graph = trace(model, inputs)
        self.signal = Wasserstein(projections=3, per_class=PER_CLASS)
        self.sites = [(group, site) for group in self.graph.groups for site in self.signal.sites(group)]
        random = torch.Generator().manual_seed(0)
        self.batches: list[Recorded] = []
        for index, size in enumerate(SIZES):
            step = Step(index, size, torch.randint(0, 4, (size,), generator=random))
            shapes = [
                (size, len(site.unit), *(traced_map(self.graph, site) or (1,))) for _, site in self.sites
            ]
            values = [torch.randn(*shape, generator=random) for shape in shapes]
            self.batches.append((step, values))

    def tally(self) -> Tally:
        return self.signal.start(Context(self.graph, {}, frozenset(), seed=0))

    def feed(self, tally: Tally, batches: list[Recorded]) -> Tally:
        for step, values in batches:
            tally.begin(step)
            for (group, site), value in zip(self.sites, values, strict=True):
                tally.observe(group, site, value.flatten(2), replace(step, map=tuple(value.shape[2:])))
        return tally

    def assert_as_one_run(self, tally: Tally) -> None:
        expected = self.feed(self.tally(), self.batches).finish()
        found = tally.finish()
        assert found.keys() == expected.keys()
        for name, vector in expected.items():
            np.testing.assert_array_equal(found[name], vector)


@pytest.mark.parametrize("read", range(len(SIZES) + 1))
def test_resumes_bit_for_bit(read: int) -> None:
    run = _Run()
    stored = safetensors.torch.save(run.feed(run.tally(), run.batches[:read]).state())
    resumed = run.tally()
    resumed.merge([safetensors.torch.load(stored)])
    run.assert_as_one_run(run.feed(resumed, run.batches[read:]))


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_that_share_the_data_keep_what_one_would(processes: int) -> None:
    run = _Run()
    shares = [run.feed(run.tally(), run.batches[rank::processes]) for rank in range(processes)]
    merged = run.tally()
    merged.merge([share.state() for share in shares])
    kept = merged.state()["samples"]
    assert torch.bincount(kept[:, 2]).tolist() == [PER_CLASS] * 4
    run.assert_as_one_run(merged)


def test_a_merged_tally_goes_on() -> None:
    run = _Run()
    shares = [run.feed(run.tally(), run.batches[rank:4:2]) for rank in range(2)]
    merged = run.tally()
    merged.merge([share.state() for share in shares])
    run.assert_as_one_run(run.feed(merged, run.batches[4:]))


def test_no_samples_at_all_are_refused() -> None:
    with pytest.raises(CalibrationError, match="samples of at least two classes, got none"):
        _Run().tally().finish()


def test_holds_what_it_says() -> None:
    run = _Run()
    state = run.feed(run.tally(), run.batches).state()
    assert torch.bincount(state["samples"][:, 2]).tolist() == [PER_CLASS] * 4
    for number, (group, site) in enumerate(run.sites):
        held, entries = state[f"projected.{number}"], len(site.unit)
        bound = (
            run.signal.held(run.graph, 4)[group.name]
            * entries
            // sum(len(s.unit) for s in run.signal.sites(group))
        )
        alone = traced_map(run.graph, site) == ()  # one number has one direction
        assert held.nbytes == (bound // 3 if alone else bound)


def test_units_may_be_permuted() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)).double()
    data, order = labelled("plain"), torch.tensor([3, 1, 5, 0, 2, 4])
    before = score(trace(net, data[0][0]), data, "wasserstein")["wasserstein"]["0"]
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[order].clone())
        net[0].bias.copy_(net[0].bias[order].clone())
    after = score(trace(net, data[0][0]), data, "wasserstein")["wasserstein"]["0"]
    np.testing.assert_allclose(after, before[order.numpy()], rtol=1e-12)


def test_seeds_differ_for_maps_and_repeat() -> None:
    model, data = build("plain"), labelled("plain")
    graph = trace(model, data[0][0])
    name = graph.groups[0].name
    a, b, c = (score(graph, data, "wasserstein", seed=s)["wasserstein"][name] for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def _site(stage: str, producer: str, node: str) -> Site:
    return Site(node, 1, stage, producer, np.arange(2), np.arange(2))  # type: ignore[arg-type]


def test_stage_is_chosen_for_each_producer() -> None:
    sites = (
        _site("produced", "a", "a0"),
        _site("normalised", "a", "a1"),
        _site("activated", "a", "a2"),
        _site("produced", "b", "b0"),
        _site("activated", "c", "c2"),
    )
    group = Group("g", 2, (), sites, True)
    chosen = {
        s: [x.node for x in Wasserstein(stage=s).sites(group)]
        for s in ("produced", "normalised", "activated")
    }
    assert chosen == {
        "produced": ["a0", "b0", "c2"],
        "normalised": ["a1", "b0", "c2"],
        "activated": ["a2", "b0", "c2"],
    }


def test_stage_changes_what_is_seen() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[0].bias.zero_()
    data = [(torch.tensor([[1.0], [3.0]], dtype=torch.float64), torch.tensor([0, 1]))]
    graph = trace(net, data[0][0])
    produced, activated = (
        score(graph, data, Wasserstein(stage=s))["wasserstein"]["0"] for s in ("produced", "activated")
    )
    np.testing.assert_allclose(produced, [2.0, 2.0])
    np.testing.assert_allclose(activated, [2.0, 0.0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 1, 1]), "wasserstein: expected samples of at least two classes, got only class 1"),
        (torch.tensor([0, -1, 1]), "batch 0: expected labels from 0, got label -1"),
        (torch.tensor([0, 5, 1]), "batch 0: labels: expected classes from 0 to 4.* got label 5"),
        (
            torch.tensor([0, 1]),
            "signal wasserstein: calibration batch 0: expected 3 labels, one a sample, got 2",
        ),
        (torch.tensor([0.0, 1.0, 1.0]), "expected integer labels, got torch.float32"),
        (torch.tensor([[0], [1], [1]]), r"expected labels \[3\], one class a sample, got shape \[3, 1\]"),
        (None, "signal wasserstein: calibration batch 0: expected labels.*got none"),
    ],
)
def test_labels_that_cannot_be_used(labels: torch.Tensor | None, message: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    graph = trace(build("mlp"), x)
    with pytest.raises(CalibrationError, match=message):
        score(graph, [(x, labels)], "wasserstein")


def test_activations_that_overflow_are_named() -> None:
    model, x = build("mlp"), torch.full((4, 6), 1e308, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    graph = trace(model, torch.zeros_like(x))
    with pytest.raises(CalibrationError, match="batch 0: wasserstein, group 0: expected finite activations"):
        score(graph, [(x, torch.tensor([0, 1, 0, 1]))], "wasserstein")


@pytest.mark.parametrize("shape", [(4, 2, 9), (4, 2, 6, 8)])
def test_maps_of_other_sizes_are_averaged_to_the_traced_one(shape: tuple[int, ...]) -> None:
    dimensions = len(shape) - 2
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
    pool: Any = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d}[dimensions]
    net = nn.Sequential(conv(2, 4, 1), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(4, 2)).double()
    x, labels = torch.randn(*shape, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    graph = trace(net, x)
    doubled = x
    for axis in range(2, x.ndim):
        doubled = doubled.repeat_interleave(2, axis)  # whose means over pairs are x again
    once, mixed = (
        score(graph, data, "wasserstein")["wasserstein"]["0"]
        for data in ([(x, labels)], [(x[:2], labels[:2]), (doubled[2:], labels[2:])])
    )
    np.testing.assert_allclose(mixed, once, rtol=1e-12)


def test_a_unit_that_nobody_can_see_is_refused() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    graph = trace(build("mlp"), x)
    object.__setattr__(graph.groups[0], "sites", ())
    with pytest.raises(ScoreError, match="group 0: expected every unit to be observable, got 12 of 12"):
        score(graph, [(x, torch.tensor([0, 1, 0, 1]))], "wasserstein")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projections": 0}, "projections of at least 1, got 0"),
        ({"per_class": 0}, "per_class of at least 1, got 0"),
        ({"stage": "late"}, "stage to be one of produced, normalised, activated, got 'late'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Wasserstein(**settings)  # type: ignore[arg-type]


def test_samples_without_a_class_are_left_out() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x, y, ignored = torch.randn(24, 4), torch.arange(24) % 3, torch.rand(24) < 0.3
    graph = sc.trace(net, x)
    found = sc.score(graph, [(x, y.masked_fill(ignored, -100))], ("wasserstein", "taylor"), progress=False)
    expected = sc.score(graph, [(x[~ignored], y[~ignored])], ("wasserstein", "taylor"), progress=False)
    assert found.classes == expected.classes == 3
    assert np.array_equal(found["wasserstein"]["0"], expected["wasserstein"]["0"])
    ordered = [np.argsort(scores["taylor"]["0"]).tolist() for scores in (found, expected)]
    assert ordered[0] == ordered[1]


def test_auto_takes_data_of_which_some_have_no_class() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    labels = [torch.arange(8) % 3, torch.full((8,), -100), torch.tensor([0, -100, 1, -100, 2, 0, 1, -100])]
    data = [(torch.randn(8, 4), y) for y in 2 * labels]
    result = sc.prune(net, data, sc.Budget(macs=0.7), measure_latency=False, progress=False)
    assert result.report.proof["proven"]


@pytest.mark.parametrize("lengths", [(1, 2, 3), (3, 1, 2)])
def test_a_traced_length_of_one_is_a_length(lengths: tuple[int, ...]) -> None:
    """Where positions are folded into the batch, one position leaves no axis for them."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.m = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
            self.o = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.e(x).relu()
            return self.o(h + self.m(h, h, h)[0]).mean(1)

    torch.manual_seed(0)
    net = Attends().eval()
    data = [(torch.randn(4, n, 6), torch.arange(4) % 3) for n in lengths]
    scores = sc.score(sc.trace(net, data[0][0]), data, "wasserstein", progress=False)
    assert all(np.isfinite(values).all() for values in scores["wasserstein"].values())
