"""The frontier's tables say what the result file says: means, spread, who leads, where a peer wins."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.frontier import report, tables
from benchmarks.frontier.summary import COMES, REPAIRED, contest, rows, standard_error


def runs(side: str, rule: str, point: float, **stages: list[float]) -> list[dict[str, Any]]:
    """One run a seed; each stage has a top-1 for each."""
    return [
        {
            "seed": seed, "side": side, "rule": rule, "point": point, "macs": point - 0.001, "params": 0.25,
            "top1": dict(zip(stages, values, strict=True)), "seconds": {"prune": 1.0 + seed, "repair": 2.0},
        }
        for seed, values in enumerate(zip(*stages.values(), strict=True))
    ]  # fmt: skip


def content(*of: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "network": "tiny", "dense_top1": 0.9, "calibration_images": 100, "test_images": 50,
        "runs": [run for some in of for run in some], "tuned": [],
    }  # fmt: skip


OURS = (
    runs("secateur", "tod", 0.5, pruned=[0.1, 0.2, 0.3], repaired=[0.80, 0.82, 0.84]),
    runs("secateur", "emp", 0.5, pruned=[0.1, 0.2, 0.3], repaired=[0.79, 0.80, 0.81]),
)
PEER = runs("Torch-Pruning", "L1, global", 0.5, pruned=[0.4, 0.4, 0.4], batchnorm=[0.70, 0.72, 0.71])


def test_means_spread_and_the_leader_in_bold() -> None:
    text = tables.short([content(*OURS, PEER)])
    expected = (
        "| tiny, 90.0 | 0.5 | – | **82.0 ± 2.0** (tod) | 40.0 ± 0.0 (Torch-Pruning, L1, global) "
        "| 71.0 ± 1.0 (Torch-Pruning, L1, global) |"
    )
    assert expected in text.splitlines()
    assert text.endswith("No peer wins anywhere.")
    assert "3 draws" in text.replace("\n", " ")


def test_a_peer_that_wins_is_in_bold_and_named() -> None:
    better = runs("Torch-Pruning", "Taylor, uniform", 0.5, pruned=[0.3] * 3, batchnorm=[0.85] * 3)
    text = tables.short([content(*OURS, PEER, better)])
    assert "**85.0 ± 0.0** (Torch-Pruning, Taylor, uniform)" in text
    assert "A peer wins on tiny at 0.5 (Torch-Pruning, Taylor, uniform, by 3.0)." in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("auto", "said"),
    [
        ([0.81, 0.82, 0.82], "at 1 of 1 points."),  # behind by 0.33 ± 0.88
        ([0.78, 0.80, 0.82], "at 0 of 1 points; it is behind on tiny at 0.5 by 2.0 (tod)."),  # by 2 ± 0
        ([0.85, 0.85, 0.85], "at 1 of 1 points."),
    ],
)
def test_auto_is_held_to_one_standard_error_of_the_first(auto: list[float], said: str) -> None:
    text = tables.short([content(*OURS, runs("secateur", "auto", 0.5, repaired=auto))])
    assert text.replace("\n", " ").endswith(said)


def test_the_standard_error_is_of_paired_differences() -> None:
    one, other = (row.cells[0.5] for row in rows(content(*OURS)) if row.stage == REPAIRED)
    # differences 1, 2, 3: their standard deviation 1, over the root of 3
    assert standard_error(one, other) == pytest.approx(3**-0.5)


def test_search_and_polish_have_columns_and_auto_is_held_to_what_does_not_train() -> None:
    more = [
        runs("secateur", rule, 0.5, repaired=[top1] * 3)
        for rule, top1 in (("auto", 0.83), ("search", 0.82), ("polish", 0.87))
    ]
    text = tables.short([content(*OURS, PEER, *more)])
    assert "| 0.5 | 83.0 ± 0.0 | 82.0 ± 0.0 | **87.0 ± 0.0** | 82.0 ± 2.0 (tod) |" in text
    assert text.replace("\n", " ").endswith("at 1 of 1 points.")


def test_a_failure_is_shown_and_leaves_no_figure() -> None:
    broken = {
        "seed": 0,
        "side": "Torch-Pruning",
        "rule": "L1, all",
        "point": 0.5,
        "error": "RuntimeError: shapes",
    }
    text = tables.full([content(*OURS, [broken])])
    assert "| Torch-Pruning | L1, all | as it comes | – |" in text
    assert "- Torch-Pruning: `RuntimeError: shapes` (L1, all at 0.5)" in text
    assert contest(rows(content(*OURS, [broken])), 0.5).comes is None


def test_a_rule_that_failed_for_one_seed_has_no_mean() -> None:
    partly = runs("Torch-Pruning", "L1", 0.5, pruned=[0.99, 0.99, 0.99])
    partly[1] = {"seed": 1, "side": "Torch-Pruning", "rule": "L1", "point": 0.5, "error": "MemoryError: "}
    assert contest(rows(content(*OURS, partly)), 0.5).comes is None


def test_costs_and_median_seconds() -> None:
    (line,) = (x for x in tables.full([content(*OURS)]).splitlines() if "| tod | every layer" in x)
    assert line == "| secateur | tod | every layer refitted | **82.0 ± 2.0** | 0.499 | 0.250 | 4.0 |"


def test_a_peer_without_batch_norms_competes_as_it_comes() -> None:
    plain = runs("Torch-Pruning", "L1", 0.5, pruned=[0.6, 0.6, 0.6])
    given = contest(rows(content(*OURS, plain)), 0.5).given
    assert given is not None
    assert given.stage == COMES


def test_readme_part_is_replaced_and_compared() -> None:
    text = f"before\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nafter\n"
    new = report.replaced(text, "new\n\nlines")
    assert report.between(new) == "new\n\nlines"
    assert new == f"before\n\n{report.BEGIN}\n\nnew\n\nlines\n\n{report.END}\n\nafter\n"
    assert report.replaced(new, "new\n\nlines") == new


@pytest.mark.parametrize(
    "text", ["", report.BEGIN, f"{report.END} {report.BEGIN}", report.BEGIN * 2 + report.END]
)
def test_missing_markers_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        report.replaced(text, "block")


def test_readme_and_tables_are_up_to_date() -> None:
    if not report.contents():
        pytest.skip("nothing was measured yet")
    assert report.stale() == []
