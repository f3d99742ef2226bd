from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import binomtest

from secateur.report import sentences
from secateur.report.outcomes import outcomes, settings
from tests.report.reports import DENSE, KNOB, PRUNED, REPAIRED, report


@pytest.mark.parametrize(("right", "samples"), [(0, 7), (1, 7), (324, 360), (360, 360)])
def test_the_interval_is_wilsons(right: int, samples: int) -> None:
    expected = binomtest(right, samples).proportion_ci(0.95, method="wilson")
    assert sentences.wilson(right / samples, samples) == pytest.approx(
        (expected.low, expected.high), abs=1e-7
    )


def test_accuracies_come_with_what_their_samples_can_tell() -> None:
    (line,) = sentences.interval(report())
    assert line.startswith("Accuracy was measured on 360 samples.")
    assert "dense 97.58 to 99.72 %" in line
    unknown = tuple(f.model_copy(update={"samples": None}) for f in (DENSE, PRUNED))
    assert sentences.interval(report(figures=unknown)) == ()


def timed(median: float, low: float, high: float) -> Any:
    return report(
        figures=(DENSE, REPAIRED.model_copy(update={"latency": median, "latency_quartiles": (low, high)}))
    )


def test_speed_is_claimed_only_where_the_spreads_are_apart() -> None:
    assert sentences.speed(report()) == "The pruned model is 1.21 times as fast."
    assert "no gain" in sentences.speed(timed(0.0030, 0.0028, 0.00342))
    assert "no gain" in sentences.speed(timed(0.0036, 0.0035, 0.004))
    assert sentences.speed(timed(0.0069, 0.0068, 0.007)) == (
        "The pruned model is slower: it takes 2.00 times as long."
    )
    bare = DENSE.model_copy(update={"latency": None})
    assert sentences.speed(report(figures=(bare, bare))) == ""


def entry(method: str, kept: bool, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "kept": kept,
        "measure": "loss",
        "before": 2,
        "after": 1,
        "held_out_samples": 9,
        **more,
    }


def test_a_combination_shows_the_layers_of_what_it_began_with() -> None:
    layers = {"a.weight": {"damping": 0.1, "before": 0.5, "after": 0.1}}
    tried = (
        entry("variance", False, layers={"a.weight": {"before": 0.5, "after": 0.4}}),
        entry("reconstruct", False, layers=layers),
        entry("reconstruct + batchnorm", True),
    )
    (found,) = sentences.refits(report(repairs=tried))
    assert found == sentences.Refit("reconstruct", (("a.weight", 0.5, 0.1),))
    assert (
        sentences.refits(report(repairs=(entry("batchnorm", True), entry("bias", False, layers=layers))))
        == ()
    )
    other = entry("experts", True, layers={"a": {"scale": 1.0}})
    assert sentences.refits(report(repairs=(other,))) == ()


def test_the_knob_says_where_the_plan_is_and_what_could_be() -> None:
    said = sentences.knob(report())
    assert "The plan's tolerance is 0.25, which leaves 46.3 % of the MACs" in said
    assert "units that came back to spend the budget make it 46.3 %" in said
    assert "none leaves less than 9.8 %" in said
    assert sentences.knob(report(knob=KNOB.model_copy(update={"at": None}))).startswith("Nothing had to go")
    assert sentences.knob(report(knob=None)) == ""


@pytest.mark.parametrize(
    ("budget", "asked", "achieved"),
    [
        ({"macs": 0.5}, "at most 50 % of the MACs", "18.91 M of 40.81 M, 46.3 %"),
        ({"params": 100_000}, "at most 100,000 parameters", "91,606 of 174,970, 52.4 %"),
        (
            {"sparsity": 0.25},
            "at least 25 % of the weights of linear layers and convolutions zero",
            "23.8 % of these weights zero, 47.6 % of all parameters",
        ),
        ({"experts": 0.75}, "at most 75 % of the experts", "61 of 80, 76.2 %"),
        ({"latency": 0.9}, "at most 90 % of the latency", "2.85 ms of 3.45 ms, 82.6 %"),
        ({"macs": 0.5, "spend": False}, "at most 50 % of the MACs", "18.91 M of 40.81 M, 46.3 %"),
        (None, "none, the allocator decides", "MACs 18.91 M of 40.81 M, 46.3 %"),
    ],
)
def test_what_was_asked_stands_beside_what_was_achieved(budget: Any, asked: str, achieved: str) -> None:
    first, *_, repair, form = outcomes(report(asked=report().asked | {"budget": budget}))
    assert (first.asked, first.achieved) == (asked, achieved)
    assert (repair.asked, repair.achieved) == ("auto", "batchnorm")
    assert (form.asked, form.achieved) == ("auto", "module")


def test_every_setting_is_listed() -> None:
    asked = report().asked | {"loss": "default", "allow_inexact": True, "anything": [1, 2]}
    found = dict(settings(report(asked=asked, calibration={"samples": 1200, "classes": 10})))
    assert found["allow_inexact"] == "yes"
    assert found["anything"] == "1, 2"
    assert found["samples scored"] == "1,200"
    assert found["granularity"] == "unit"
    assert found["round_to"] == "8"
    assert found["tolerance"] == "0.25, solved for the budget"
    assert list(found)[-1] == "seed"
    everything = {*report().asked, *report().settings, *report().settings["limits"]}  # type: ignore[misc]
    assert everything - {"limits", "ignore"} <= set(found)


def test_loading_defines_make_model_where_it_is_known() -> None:
    known = report(make_model="from net import make as make_model")
    assert sentences.reloading(known).splitlines() == [
        "import secateur as sc",
        "from net import make as make_model",
        'model = sc.load("demo", make_model)',
    ]
    assert sentences.reloading(report(artefact=None)) == ""


def test_numbers_that_follow_are_listed_once_for_all_layers() -> None:
    sizes: dict[str, Any] = {f"layers.{k}.heads": 2 for k in range(5)}
    sizes |= {"config.heads": 2, "blocks.0.width": 7, "blocks.1.width": 8}
    assert sentences.form(report(attributes=sizes)).endswith(
        " Numbers that follow: blocks.*.width = 7 or 8, config.heads = 2, layers.*.heads = 2."
    )
    many = report(attributes={f"part{chr(97 + k)}.heads": 1 for k in range(11)})
    assert "and 3 more, which the JSON lists" in sentences.form(many)
    assert "follow" not in sentences.form(report())
