from __future__ import annotations

import re

import pytest

from secateur.report import shapes
from secateur.report.data import Histogram, Knob
from tests.report.reports import DENSE, KNOB, PRUNED, REMOVAL, report


def rectangles(path: str) -> list[tuple[float, ...]]:
    """Left, bottom, right, top of each bar."""
    found = re.findall(r"M(\S+) (\S+)H(\S+)V(\S+)H(\S+)Z", path)
    assert "".join(f"M{a} {b}H{c}V{d}H{e}Z" for a, b, c, d, e in found) == path
    assert all(a == e for a, *_, e in found)
    return [tuple(map(float, bar[:4])) for bar in found]


def test_bars_are_as_high_as_they_count_and_stand_on_each_other() -> None:
    bars = shapes.bars(REMOVAL)  # kept 0 4 6, removed 4 2 0
    third = pytest.approx(100 / 3, rel=1e-3)
    removed, kept = rectangles(bars.removed), rectangles(bars.kept)
    assert [(100 - t) * 6 / 100 for *_, t in removed] == pytest.approx([4, 2], rel=1e-3)
    assert [(b - t) * 6 / 100 for _, b, _, t in kept] == pytest.approx([4, 6], rel=1e-3)
    assert kept[0][1] == removed[1][3]  # on top of what goes
    assert removed[0][2] - removed[0][0] == third
    assert bars.cut == pytest.approx(50)  # 1.25 in 0.5 to 2
    assert "10 units stay and 6 go" in bars.text


def test_the_cut_is_placed_in_its_bin_also_on_a_log_scale() -> None:
    log = Histogram(
        signal="s", edges=(1.0, 10.0, 100.0), kept=(0, 5), removed=(3, 1), cut=10**1.5, scale="log"
    )
    assert shapes.bars(log).cut == pytest.approx(75)
    assert shapes.bars(log.model_copy(update={"cut": 100.0})).cut == pytest.approx(100)
    assert shapes.bars(log.model_copy(update={"cut": None})).cut is None
    flat = Histogram(signal="s", edges=(2.0, 2.0), kept=(5,), removed=(1,), cut=2.0)
    assert shapes.bars(flat).cut == 0


def points(path: str) -> list[tuple[float, float]]:
    """Where each stair ends."""
    assert path.startswith("M0 0")
    return [(float(x), float(y)) for y, x in re.findall(r"V(\S+?)H([^V]+)", path)]


def test_the_curve_holds_each_value_up_to_the_next() -> None:
    found = shapes.knob_plot(report())
    assert found is not None
    macs = points(found.macs)
    assert [100 - y for _, y in macs] == pytest.approx([100 * m / KNOB.macs[0] for m in KNOB.macs], rel=1e-3)
    ends = [x for x, _ in macs]
    assert ends[-1] == 100
    assert ends[0] == 0  # the first tolerance is 0
    quarter = next(tick.at for tick in found.ticks if tick.label == "0.2") * 1.25
    assert ends[2] == pytest.approx(quarter, rel=1e-3)
    assert found.plan == (
        pytest.approx(quarter, rel=1e-3),
        pytest.approx(100 * (1 - 18_910_000 / 40_813_184)),
    )
    assert found.name == "tolerance"
    assert shapes.knob_plot(report(knob=None)) is None


@pytest.mark.parametrize(
    "values",
    [
        (1e-9, 1e-7, 1e-5, 1.0),
        (-3.0, -2.0, -1.0, -0.5),
        (0.5, 0.50001, 0.50002, 0.50003),
        (0.0, 0.1, 0.2, 1.0),
    ],
)
def test_any_knob_fits_the_plot(values: tuple[float, ...]) -> None:
    curve = KNOB.model_copy(update={"values": values, "at": None})
    found = shapes.knob_plot(report(knob=curve))
    assert found is not None
    assert found.plan is None
    assert 2 <= len(found.ticks) <= 9
    assert all(-0.01 <= tick.at <= 100.01 for tick in found.ticks)
    ends = [x for x, _ in points(found.macs)]
    assert ends == sorted(ends)
    assert 0 <= ends[0]
    if values[0] == 1e-9:  # spread out, not all at the left edge
        assert ends[0] < 10 < ends[1] < ends[2] < 90
        assert any(tick.label.startswith("1e-") for tick in found.ticks)


def test_one_value_is_a_curve_too() -> None:
    for value in (0.0, 0.3, -2.0):
        one = Knob(values=(value,), macs=(10, 5), params=(10, 5), at=0)
        assert shapes.knob_plot(report(knob=one)) is not None


def test_passes_lie_on_one_axis_and_those_beyond_are_counted() -> None:
    found, ticks = shapes.strips(report())
    assert [strip.stage for strip in found] == ["dense", "pruned"]
    dense, pruned = found
    assert (dense.beyond, pruned.beyond) == (0, 1)  # 9.9 ms is more than twice the largest third quartile
    assert len(pruned.runs) == len(PRUNED.latency_runs) - 1
    zero, other = ticks[0], ticks[-1]
    assert (zero.at, zero.label) == (0, "0")
    per_ms = other.at / float(other.label)
    assert dense.box == pytest.approx((3.42 * per_ms, 3.5 * per_ms, 3.45 * per_ms))
    assert dense.runs == pytest.approx([1e3 * run * per_ms for run in DENSE.latency_runs])
    bare = tuple(f.model_copy(update={"latency_runs": ()}) for f in (DENSE, PRUNED))
    assert shapes.strips(report(figures=bare)) == ((), ())
