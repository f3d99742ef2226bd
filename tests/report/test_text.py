from __future__ import annotations

import re

import pytest

from secateur.report import proofs
from secateur.report.data import Kept, Layer
from secateur.report.text import MOST_LAYERS, bar, table
from tests.report.reports import DENSE, PRUNED, report


def line_of(text: str, start: str) -> list[str]:
    """The cells of the only line that begins with `start`."""
    lines = [line for line in text.splitlines() if re.match(rf"{re.escape(start)}(\s|$)", line)]
    assert len(lines) == 1, lines
    return re.split(r"\s{2,}", lines[0].strip())


def test_the_table_has_every_figure_of_each_model() -> None:
    text = table(report())
    assert line_of(text, "dense")[1:] == [
        "99.17 %",
        "0.0693",
        "174,970",
        "40.81 M",
        "0.704",
        "3.45 (3.42–3.50)",
    ]
    assert line_of(text, "pruned")[1:] == [
        "15.56 %",
        "3.689",
        "91,606",
        "18.91 M",
        "0.370",
        "2.85 (2.81–2.89)",
    ]
    assert line_of(text, "repaired")[1:3] == ["89.72 %", "0.4909"]


def test_figures_are_given_relative_to_dense_and_accuracy_in_points() -> None:
    lines = table(report()).splitlines()
    below = lines[next(i for i, line in enumerate(lines) if line.startswith("pruned")) + 1]
    assert re.split(r"\s{2,}", below.strip()) == ["−83.61", "5,323 %", "52.4 %", "46.3 %", "52.5 %", "82.6 %"]


def test_columns_line_up() -> None:
    lines = table(report()).splitlines()
    rows = [line for line in lines if line.startswith(("dense", "pruned", "repaired"))]
    assert len({len(row) for row in rows}) == 1
    assert len({row.index("40.81 M") for row in rows if "40.81 M" in row} | {rows[1].index("18.91 M")}) == 1


def test_what_macs_mean_is_said() -> None:
    assert "for one sample, half of FLOPs" in " ".join(table(report()).split())


def test_layers_show_what_they_kept() -> None:
    text = table(report())
    assert re.search(r"^stem \(\+2\) +10 / 16 +█{12}░{8} +62\.5 %$", text, re.MULTILINE)
    assert re.search(r"^body\.conv +51 / 64 +█{16}░{4} +79\.7 %$", text, re.MULTILINE)


def test_a_long_list_of_layers_is_cut_with_a_count() -> None:
    layers = tuple(
        Layer(group=f"layer{i}", kept=3, total=4, producers=(f"layer{i}.weight",))
        for i in range(MOST_LAYERS + 5)
    )
    text = table(report(layers=layers))
    assert f"layer{MOST_LAYERS - 1} " in text
    assert f"layer{MOST_LAYERS} " not in text
    assert "and 5 more that kept 15 of 20 units" in text


@pytest.mark.parametrize(
    ("kept", "total", "full"), [(1, 1000, 1), (999, 1000, 7), (0, 4, 0), (4, 4, 8), (2, 4, 4)]
)
def test_a_bar_is_full_or_empty_only_if_all_or_nothing_is_kept(kept: int, total: int, full: int) -> None:
    assert bar(kept, total, width=8) == "█" * full + "░" * (8 - full)


def test_the_proof_names_its_reference_and_difference() -> None:
    text = " ".join(table(report()).split())
    assert "the dense model with the same units zeroed" in text
    assert "its output differs by 3.1e-16 relative (allowed: 1e-09)" in text
    other = {"difference": 0.0, "tolerance": 1e-9, "reference": "graph", "outputs": 3}
    text = " ".join(table(report(proof=other)).split())
    assert "the captured program with the same units cut out" in text
    assert "its 3 outputs differ by" in text


def test_repair_says_what_it_brought() -> None:
    text = " ".join(table(report()).split())
    assert "batchnorm: kept; loss 3.63 before and 0.56 after, on 60 held-out calibration samples." in text


def test_repair_says_if_nothing_helped() -> None:
    worse = {
        "method": "batchnorm",
        "kept": False,
        "measure": "loss",
        "before": 0.5,
        "after": None,
        "held_out_samples": 6,
    }
    text = table(report(repairs=(worse,), figures=(DENSE, PRUNED)))
    assert "batchnorm: not kept; loss 0.5 before and not finite after" in text
    assert "Nothing that was tried helped" in text
    assert "repaired " not in text


def test_repair_says_if_it_was_not_wanted_or_not_possible() -> None:
    asked = report().asked | {"repair": None}
    assert "None was asked for." in table(report(repairs=(), asked=asked))
    why = {"method": "batchnorm", "kept": False, "why": "the model has nothing that it could change"}
    assert "batchnorm: not done, the model has nothing that it could change." in table(report(repairs=(why,)))


def test_what_was_left_is_grouped_by_reason_and_shortened() -> None:
    many = tuple(Kept(what=f"w{i} axis 0", reason="model output") for i in range(9))
    text = table(
        report(untouched=(*many, Kept(what="norm", reason="mixed by layer_norm", where="net.py:12")))
    )
    assert "model output: w0 axis 0, w1 axis 0, w2 axis 0 and 6 more" in text
    assert "mixed by layer_norm: norm (at net.py:12)" in text


def test_settings_say_what_was_solved() -> None:
    text = " ".join(table(report()).split())
    assert "tolerance 0.25, solved for the budget" in text
    assert "budget at most 50 % of the MACs" in text
    assert "round_to 8" in text
    assert "seed 7" in text
    unasked = " ".join(table(report(asked=report().asked | {"budget": None})).split())
    assert "tolerance 0.25;" in unasked
    assert "budget none, the allocator decided" in unasked


def test_it_says_where_the_model_is_and_how_to_load_it() -> None:
    assert table(report()).endswith(
        'reload with\n  import secateur as sc\n  model = sc.load("demo", make_model)'
    )
    assert table(report(), reload="python -c 1").endswith("written to  demo\nreload with\n  python -c 1")
    assert "reload" not in table(report(artefact=None))


def test_without_accuracy_and_latency_their_columns_are_left_out() -> None:
    bare = {
        "accuracy": None,
        "latency": None,
        "latency_quartiles": None,
        "measure": "distance to dense",
        "loss": 0.0,
    }
    text = table(
        report(figures=(DENSE.model_copy(update=bare), PRUNED.model_copy(update=bare | {"loss": 0.25})))
    )
    assert "accuracy" not in text
    assert "latency" not in text.lower()
    assert "distance to the dense model's outputs" in " ".join(text.split())
    below = text.splitlines()[[line.startswith("pruned") for line in text.splitlines()].index(True) + 1]
    assert below.split()[0] == "–"  # no percentage of zero


def test_the_masked_form_is_not_called_smaller() -> None:
    assert "the units are zeroed, not taken out" in " ".join(table(report(form="masked")).split())


def test_it_is_plain_text_of_terminal_width() -> None:
    text = table(report())
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert str(report()) == text


def test_what_removing_mixed_units_means_is_said() -> None:
    exact = report()
    mixed = exact.model_copy(update={"proof": {**exact.proof, "reference": "graph"}})
    assert proofs.MIXED in proofs.paragraph(mixed)
    assert proofs.MIXED not in proofs.paragraph(exact)


def test_the_sizes_of_the_inputs_are_said_where_they_are_known() -> None:
    text = " ".join(table(report()).split())
    assert f"sizes of the inputs {report().takes}" in text
    assert "sizes of the inputs" not in table(report(takes=""))
