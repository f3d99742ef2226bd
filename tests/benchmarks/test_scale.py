"""What `benchmarks.scale` counts on paper, against what really runs on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from benchmarks import results
from benchmarks.scale import exchange, rates, repairing, scoring, tables
from benchmarks.scale.least_squares import eliminate, fit
from benchmarks.scale.passes import forward, forward_backward
from benchmarks.scale.simulation import Meter
from benchmarks.scale.subject import Subject
from benchmarks.scale.work import KINDS, Work, total
from secateur.calibration import Batch, Calibration
from secateur.repairs.regression import elimination, leastsquares
from secateur.repairs.regression.leastsquares import Sums
from secateur.repairs.sweep import sweep
from secateur.signals.onepass import OnePass
from secateur.signals.registry import SIGNALS
from secateur.stream import pending

CONV = 3 * 8 * 9 * 36 + 8 * 6 * 9 * 36  # multiply-adds of one sample: outputs of 6 × 6, kernels of 3 × 3
HEAD = 6 * 4


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def subject(device: str = "meta", samples: int = 8) -> Subject:
    model = network().to(device)
    return Subject("tiny", model, lambda n: torch.randn(n, 3, 6, 6, device=device), samples, samples, 4, 4)


def data(samples: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = torch.randn(samples, 3, 6, 6), torch.arange(samples) % 4
    return list(zip(x.split(4), y.split(4), strict=True))


def test_products_of_a_pass_are_those_of_its_layers() -> None:
    one = forward(subject())
    assert one.amounts["convolution float32"] == 4 * CONV
    assert one.amounts["matmul float32"] == 4 * HEAD
    both = forward_backward(subject())
    first = 3 * 8 * 9 * 36  # nothing wants the gradient of the images
    assert both.amounts["convolution float32"] == 4 * (3 * CONV - first)
    assert both.products == one.products * 3 - 4 * first - 4 * HEAD  # the head produces no units


def test_bytes_held_by_a_forward_pass() -> None:
    with Meter() as meter:
        x = torch.zeros(100)
        y = x + 1
        del x
        z = y.view(10, 10)
        del y
        z = z * 2 * 3
        del z
    assert meter.work().peak == 3 * 400  # a product's operand, result, and the next result
    assert meter.live == 0


def test_a_meta_run_counts_what_a_real_one_does() -> None:
    assert forward(subject("cpu")) == forward(subject())
    assert forward_backward(subject("cpu")) == forward_backward(subject())


@pytest.mark.parametrize(
    ("parts", "intercept", "rows"), [(4, True, 0), (2, False, 0), (1, True, 0), (4, True, 3), (1, False, 2)]
)
def test_products_of_a_least_squares_fit(
    parts: int, intercept: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rows` of each part, where they are fewer than the columns."""
    groups, columns, outputs = 2, 16, 3
    torch.manual_seed(0)
    sums = []
    for _ in range(parts):
        x = torch.randn(groups, rows or 50, columns, dtype=torch.float64)
        sums.append(Sums.of(x, x @ torch.ones(groups, columns, outputs, dtype=torch.float64)))
    seen: set[float] = set()
    descend = leastsquares.descend

    def counted(error: object, *rest: object) -> object:
        return descend(lambda damping: seen.add(damping) or error(damping), *rest)  # type: ignore[operator,arg-type]

    monkeypatch.setattr(leastsquares, "descend", counted)
    weight = torch.randn(groups, columns, outputs, dtype=torch.float64)
    bias = torch.zeros(groups, outputs, dtype=torch.float64) if intercept else None
    with Meter() as meter:
        leastsquares.fit(sums, weight, bias, intercept)
    got = meter.work().amounts["matmul float64"]
    literal = fit(groups, columns, outputs, parts, rows=rows, intercept=intercept, tried=len(seen))
    biases = (
        groups * columns * outputs * (2 * parts * (len(seen) + 2) + 2) * intercept
    )  # a column times a weight
    assert 0 <= got - literal.amounts["matmul float64"] <= biases


@pytest.mark.parametrize(("units", "each"), [(6, 1), (5, 3), (300, 1)])
def test_products_of_an_elimination(units: int, each: int) -> None:
    columns, outputs = units * each, 4
    torch.manual_seed(0)
    x = torch.randn(2 * columns, columns, dtype=torch.float64)
    weight = torch.randn(columns, outputs, dtype=torch.float64)
    unit = torch.arange(columns) // each
    consumer = elimination.Consumer(x.T @ x, weight, unit)
    with Meter() as meter:
        elimination.eliminate(units, [consumer])
    assert meter.work().amounts["matmul float64"] == columns**2 * (columns + outputs)
    assert eliminate(units, each, columns, outputs).amounts["matmul float64"] == columns**2 * (
        columns + outputs
    )


@pytest.mark.parametrize("signal", ["taylor", "wasserstein", "reconstruction"])
@pytest.mark.parametrize("samples", [8, 200])
def test_bytes_that_a_process_sends(signal: str, samples: int) -> None:
    """The tensors that a tally gives away: those of `OnePass.states`; of 200 samples, 128 are kept."""
    one = subject("cpu", samples)
    chosen = SIGNALS[signal]()
    run = OnePass(one.graph, [chosen], {signal: one.graph.groups}, None, seed=0)
    for index, raw in enumerate(data(samples)):
        run.run(Batch.of(raw, index))
    (state,) = run.states().values()
    kept = min(samples, 4 * 32)
    assert exchange.sent(one, signal, kept) == sum(tensor.nbytes for tensor in state.values())


def test_what_the_signals_say_they_hold() -> None:
    """`Signal.held`, which the memory limit goes by, and the predictions know of the same bytes."""
    one = subject(samples=128)
    wasserstein = sum(SIGNALS["wasserstein"]().held(one.graph, 4).values())
    kept = sum(
        seen.entries * seen.projections(sc.Wasserstein())
        for seen in scoring.Observed.all(one, sc.Wasserstein())
    )
    assert wasserstein == 4 * 128 * kept
    assert scoring.wasserstein(one).peak > wasserstein
    held = sum(SIGNALS["reconstruction"]().held(one.graph, 4).values())
    unique = {id(r): r for found in scoring.readers(one).values() for r in found}.values()
    assert held == sum(8 * r.parts * r.columns**2 for r in unique)


def test_products_of_the_columns_of_a_reader() -> None:
    """Of 36 positions all are read; the head reads one position of 6 columns, the convolution 36 of 72."""
    amounts = scoring.reconstruction(subject()).amounts
    columns = 8 * (36 * 72 * 73 + 1 * 6 * 7)
    assert amounts["matmul float32"] == columns + 8 * HEAD


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ("reconstruct", 1 << 30),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("reconstruct", 0), ("variance", 1 << 30), ("variance", 0))
        ),
    ],
)
def test_products_of_a_sweep(method: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two batches; those that cannot be held are read from files and written again."""
    monkeypatch.setattr(pending, "HELD_BYTES", limit)
    one = subject("cpu")
    small, graph = one.small, one.graph
    with Meter() as meter:
        sweep(method, small, graph, Calibration.of([x for x, _ in data()]))
    literal = repairing.sweep(subject(), method, limit=limit)
    assert [stop.damaged for stop in repairing.walked(subject(), method)] == [False, True, True]
    assert meter.work().amounts["convolution float32"] == literal.amounts["convolution float32"]
    assert (literal.amounts["filed"] > 0) == (limit == 0)


def test_the_share_of_a_plan_is_what_the_small_network_computes() -> None:
    one = subject()
    small = forward(one, one.small)
    assert small.products == 4 * one.plan.predicted.macs
    assert one.plan.predicted.macs <= 0.5 * one.plan.dense.macs


def test_work_adds_up() -> None:
    both = Work({"bytes": 3}, 10) + Work({"bytes": 4, "calls": 1}, 7)
    assert dict((both * 2).amounts) == {"bytes": 14, "calls": 2}
    assert both.peak == 10
    assert total([both, both]).peak == both.beside(0).peak == 10
    assert both.seconds({"bytes": 7.0, "calls": 0.5}) == 3.0
    assert both.dominant({"bytes": 7.0, "calls": 0.5}) == "calls"
    with pytest.raises(ValueError, match="expected kinds among"):
        Work({"miles": 1})


def test_rates_of_another_machine(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": dict.fromkeys(KINDS, 2.0)}))
    assert rates.load(file) == dict.fromkeys(KINDS, 2.0)
    file.write_text(json.dumps({"rates": dict.fromkeys(KINDS[1:], 2.0)}))
    with pytest.raises(SystemExit, match="positive rate for matmul float32"):
        rates.load(file)


def test_the_page_shows_the_result_file() -> None:
    content = results.read("scale")
    assert content is not None
    page = tables.PAGE.read_text(encoding="utf-8")
    for name, table in tables.page_tables(content).items():
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- end -->" in page, name
    for row in content["sent"].values():
        assert row["predicted"] == row["measured"]


def test_random_plans_need_no_values() -> None:
    assert np.array_equal(subject("cpu").plan.keep["0"], subject().plan.keep["0"])
