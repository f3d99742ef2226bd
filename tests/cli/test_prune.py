from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from tests.cli.conftest import refused, run

BASE = ("prune", "--model", "net.py:make", "--data", "net.py:load", "--out", "small")


def made_again() -> torch.nn.Module:
    make: Any = importlib.import_module("runpy").run_path("net.py")["make"]
    model: torch.nn.Module = make()
    return model


def test_it_prunes_saves_and_says_how_to_load(folder: Path) -> None:
    result = run(*BASE, "--macs", "0.5")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (folder / "small").iterdir()) == [
        "model.safetensors",
        "report.html",
        "report.json",
        "secateur.json",
    ]
    assert "made a model" not in result.stdout
    assert "written to  small" in result.stdout
    lines = [line.strip() for line in result.stdout.partition("reload with\n")[2].splitlines()]
    assert lines[-1] == 'model = sc.load("small", make_model)'
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    report = json.loads((folder / "small" / "report.json").read_text())
    pruned = report["figures"][1]
    assert sum(p.numel() for p in scope["model"].parameters()) == pruned["params"]
    assert pruned["macs"] <= 0.5 * report["figures"][0]["macs"]
    assert report["artefact"] == "small"
    page = (folder / "small" / "report.html").read_text(encoding="utf-8")
    assert "sc.load(&#34;small&#34;, make_model)" in page


def test_each_picture_in_several_views(folder: Path) -> None:
    arguments = ("--macs", "0.6", "--allocator", "repair_aware", "--json")
    plain, seen = (json.loads(run(*BASE, *arguments, *more).stdout) for more in ((), ("--views", "2")))
    assert (plain["asked"].get("views"), seen["asked"]["views"]) == (None, 2)
    assert seen["calibration"] == plain["calibration"] != {}
    assert seen["figures"][0]["samples"] == plain["figures"][0]["samples"]


def test_polish_has_its_number_of_passes(folder: Path) -> None:
    asked = (
        "--macs",
        "0.6",
        "--allocator",
        "uniform",
        "--repair",
        "reconstruct,polish",
        "--polish-passes",
        "2",
    )
    found = json.loads(run(*BASE, *asked, "--json").stdout)
    assert found["asked"]["repair"] == ["reconstruct", "polish"]
    assert [each.get("passes") for each in found["repairs"]] == [None, 2]
    assert "; 2 passes, 0.0 minutes" in run("report", "small").stdout
    said = refused(2, *BASE, "--macs", "0.6", "--polish-passes", "2")
    assert "polish-passes: expected it with repair polish, got auto" in said


def test_a_checkpoint_is_kept_until_the_result_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (*BASE, "--macs", "0.5", "--allocator", "repair_aware", "--repair", "reconstruct")
    assert run(*asked).exit_code == 0
    expected = (folder / "small" / "model.safetensors").read_bytes()

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.cli.pipeline.write_result", killed)
        assert run(*asked, "--checkpoint", "kept").exit_code != 0
    assert (folder / "kept" / "run.safetensors").exists()
    assert "with seed 3, got 0" in refused(2, *asked, "--seed", "3", "--checkpoint", "kept")
    assert run(*asked, "--checkpoint", "kept").exit_code == 0
    assert not (folder / "kept").exists()
    assert (folder / "small" / "model.safetensors").read_bytes() == expected


def test_a_search_moves_budget_between_layers(folder: Path) -> None:
    result = run(*BASE, "--macs", "0.5", "--allocator", "search", "--repair", "reconstruct", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["asked"]["allocator"] == "search"
    assert report["selection"]["candidates"][0]["verdict"] == "chosen"
    said = refused(
        2, "plan", *BASE[1:5], "--scores", "s.safetensors", "--out", "plan.json", "--allocator", "search"
    )  # fmt: skip
    assert "--allocator search: expected a single rule, because this step cannot compare rules" in said


def test_single_weights_become_zero(folder: Path) -> None:
    result = run(*BASE, "--granularity", "weight", "--sparsity", "0.7", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["asked"]["granularity"] == "weight"
    small = sc.load(folder / "small", made_again)
    weights = torch.cat([p.flatten() for p in small.parameters() if p.ndim > 1])
    assert 0.69 <= float((weights == 0).double().mean()) <= 0.75


def test_json_is_all_there_is_on_stdout(folder: Path) -> None:
    result = run(*BASE, "--macs", "0.6", "--json", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads((folder / "small" / "report.json").read_text())
    assert found["asked"]["budget"] == {"macs": 0.6}
    assert found["asked"]["seed"] == 3
    assert "made a model" in result.stderr


# torch warns of its own internals when an exported program is copied.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_it_reads_npz_and_modules_of_the_current_folder(folder: Path) -> None:
    named = (
        "prune",
        "--model",
        "net:Make.model",
        "--data",
        "x.npz",
        "--evaluation",
        "net:load",
        "--out",
        "a b",
    )
    rule = ("--allocator", "uniform", "--ratio", "0.25", "--repair", "none", "--form", "graph")
    result = run(*named, *rule, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["asked"]["allocator"] == "uniform"
    assert found["settings"]["ratio"] == 0.25
    assert found["form"] == "graph"
    assert found["judged_on"] == "evaluation data"
    assert found["repairs"] == []
    assert [(layer["kept"], layer["total"]) for layer in found["layers"]] == [(6, 8), (9, 12)]
    assert isinstance(sc.load(folder / "a b", made_again), torch.nn.Module)


def test_limits_reach_the_plan(folder: Path) -> None:
    result = run(
        *BASE, "--allocator", "uniform", "--ratio", "0.5", "--round-to", "4", "--ignore", "3", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {layer["group"]: layer["kept"] for layer in found["layers"]} == {"0": 4, "3": 12}
    result = run(*BASE, "--params", "600", "--min-keep", "5", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["asked"]["budget"] == {"params": 600}
    assert min(layer["kept"] for layer in found["layers"]) >= 5
    assert found["settings"]["limits"]["min_keep"] == 5


def test_a_tolerance_decides_without_a_budget(folder: Path) -> None:
    result = run(*BASE, "--tolerance", "0.3", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["settings"]["tolerance"] == 0.3


DEEP = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), *layers, nn.Linear(8, 3)).eval()
"""


def test_parts_weigh_layers_by_depth(folder: Path) -> None:
    (folder / "deep.py").write_text(DEEP)
    options = ("--macs", "0.8", "--allocator", "repair_aware", "--parts", "2", "--json")
    result = run("prune", "--model", "deep.py:make", *BASE[3:], *options)
    assert result.exit_code == 0, result.stderr
    factors = list(json.loads(result.stdout)["settings"]["factors"].values())
    assert len(factors) == 6
    assert min(factors) < 1 < max(factors)


def test_the_same_seed_gives_the_same_plan(folder: Path) -> None:
    plans = []
    for out in ("one", "two"):
        assert run(*BASE[:-1], out, "--macs", "0.5", "--seed", "5").exit_code == 0
        plans.append(json.loads((folder / out / "secateur.json").read_text())["plan"])
    assert plans[0] == plans[1]


def test_an_unreachable_budget_ends_with_3(folder: Path) -> None:
    line = refused(3, *BASE, "--macs", "0.0001")
    assert "as the smallest that the allocator reaches" in line


def test_a_failed_proof_ends_with_4(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise sc.VerificationError("verify: expected equal outputs, got others. Report this.")

    monkeypatch.setattr(sys.modules["secateur.pipeline.targets.units"], "verify", fails)
    assert "verify: expected equal outputs" in refused(4, *BASE, "--macs", "0.5")
    assert not (folder / "small" / "model.safetensors").exists()


def test_a_bug_ends_with_1_and_debug_shows_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of us")

    monkeypatch.setattr(sys.modules["secateur.pipeline.targets.units"], "verify", fails)
    asked = (*BASE, "--macs", "0.5", "--allocator", "uniform")
    assert "unexpected ZeroDivisionError: of us" in refused(1, *asked)
    result = run(*asked, "--debug")
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--macs", "half"), r"--macs half: expected a fraction or a count"),
        (("--macs", "1.5"), r"expected macs to be a fraction"),
        (("--macs", "0.5", "--tolerance", "0.1"), "either a tolerance or a budget, got both"),
        (("--ratio", "0.5"), "--ratio: expected it with allocator uniform, got auto"),
        (
            ("--allocator", "uniform", "--tolerance", "0.1"),
            "--tolerance: expected it with allocator tod, got uniform",
        ),
        (
            ("--macs", "0.5", "--allocator", "search", "--removal", "l1"),
            "--removal: expected a single rule",
        ),
        (("--macs", "0.5", "--allocator", "auto", "--removal", "l1"), "got allocator auto"),
        (("--allocator", "search"), "search: expected a budget, got none"),
        (("--sparsity", "0.5", "--granularity", "weight", "--allocator", "search"), "error that units leave"),
        (("--allocator", "uniform"), "either a ratio or a budget for uniform, got neither"),
        (
            ("--allocator", "uniform", "--ratio", "0.5", "--macs", "0.5"),
            "--ratio: expected either a ratio or a budget, got both",
        ),
        (("--tolerance", "2"), "tolerance"),
        (("--macs", "0.5", "--round-to", "0"), "--round-to 0: expected a number of at least 1"),
        (("--macs", "0.5", "--ignore", "nothing*"), "matches none"),
        (("--macs", "0.5", "--model", "net.py"), "no function after a colon"),
        (("--macs", "0.5", "--model", "nowhere.py:make"), "got none at nowhere.py"),
        (("--macs", "0.5", "--model", "no.such.module:make"), "got ModuleNotFoundError"),
        (("--macs", "0.5", "--model", "net.py:missing"), "got no missing. It holds Make, "),
        (("--macs", "0.5", "--model", "net.py:wrong"), "got dict. Return the model."),
        (("--macs", "0.5", "--model", "net.py:fails"), "got ValueError: no weights here"),
        (("--macs", "0.5", "--model", "net.py:instance"), "got a Linear itself"),
        (("--macs", "0.5", "--data", "net.py"), "a folder, or cifar10:FOLDER, got none of them"),
        (("--macs", "0.5", "--data", "net.py:fails"), "--data net.py:fails: expected fails() to return"),
        (("--macs", "0.5", "--data", "none.npz"), "expected a file, got none there"),
        (("--macs", "0.5", "--data", "x.npz", "--batch-size", "0"), "--batch-size 0"),
        (("--macs", "0.5", "--views", "0"), "--views 0: expected a number of at least 1"),
        (("--macs", "0.5", "--out", "net.py"), "--out net.py: expected a folder"),
    ],
)
def test_bad_input_ends_with_2_and_says_why(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(2, *BASE, *arguments)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"data": np.zeros((4, 2))}, "images, and labels named y or labels, got data [4, 2]"),
        ({}, "got no array"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, "a label for each input, got x [4, 2] float64, y [3]"),
        ({"x": np.zeros((4, 2), dtype=np.uint8)}, "got raw bytes"),
        ({"x": np.array(["a", "b"])}, "expected inputs that are numbers"),
        ({"x": np.zeros((0, 2))}, "expected samples along axis 0"),
        ({"x": np.zeros((4, 2)), "y": np.array(list("abcd"))}, "expected labels that are numbers"),
        ({"x": np.array([{}], dtype=object)}, "expected inputs that are numbers, got x [1] object"),
    ],
)  # fmt: skip
def test_a_bad_npz_is_refused_by_what_it_holds(folder: Path, arrays: dict[str, Any], said: str) -> None:
    np.savez(folder / "bad.npz", **arrays)
    assert said in refused(2, *BASE, "--macs", "0.5", "--data", "bad.npz")


def test_a_file_that_is_no_npz_is_refused(folder: Path) -> None:
    (folder / "bad.npz").write_text("no archive")
    assert "cannot be read" in refused(2, *BASE, "--macs", "0.5", "--data", "bad.npz")


def test_npz_without_labels_serves_signals_that_need_none(folder: Path) -> None:
    np.savez(folder / "bare.npz", images=np.zeros((10, 3, 6, 6), dtype=np.float32))
    assert run(*BASE, "--data", "bare.npz", "--allocator", "uniform", "--ratio", "0.25").exit_code == 0
    assert "labels" in refused(2, *BASE, "--data", "bare.npz", "--macs", "0.5", "--allocator", "tod")
    found = run(*BASE, "--data", "bare.npz", "--macs", "0.5")
    assert found.exit_code == 0
    assert "tod: did not run: signal wasserstein" in found.stdout


def test_missing_jinja_costs_the_page_and_not_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run(*BASE, "--macs", "0.5", "--json")
    assert result.exit_code == 0
    assert "report.html was not written" in result.stderr
    assert 'pip install "secateur[report]"' in result.stderr
    assert not (folder / "small" / "report.html").exists()
    assert (folder / "small" / "model.safetensors").exists()
    assert json.loads(result.stdout)["artefact"] == "small"


def test_a_bound_on_what_may_be_lost(folder: Path) -> None:
    arguments = (
        "--max-drop",
        "30%",
        "--held-out",
        "x.npz",
        "--allocator",
        "repair_aware",
        "--repair",
        "none",
    )
    report = json.loads(run(*BASE, *arguments, "--frontier", "0.5", "--json").stdout)
    assert report["asked"]["budget"] == {"accuracy_drop": 0.3}
    assert report["settings"]["met"]["accuracy_drop"]["at_most"] <= 0.3
    assert report["settings"]["met"]["held_out_samples"] == 72
    assert 0.5 in [point["share"] for point in report["frontier"]["points"]]
    page = (folder / "small" / "report.html").read_text(encoding="utf-8")
    assert "Cost against accuracy" in page


def test_bounds_on_time_and_memory(folder: Path) -> None:
    arguments = ("--max-memory", "90%", "--max-latency", "60 s", "--allocator", "uniform", "--repair", "none")
    report = json.loads(run(*BASE, *arguments, "--json").stdout)
    assert report["asked"]["budget"] == {"latency": "60 s", "memory": 0.9}
    assert report["settings"]["met"]["memory"]["high"] <= 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-latency", "30"), "latency"),
        (("--max-memory", "much"), "memory"),
        (("--max-drop", "2"), "accuracy_drop"),
        (("--max-drop", "0.5%"), "at least 598 held-out samples"),
        (("--macs", "0.5", "--held-out", "x.npz"), "held_out"),
        (("--macs", "0.5", "--tokens", "8"), "tokens"),
        (("--max-latency", "0.5", "--backend", "tvm"), "--backend tvm"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(2, *BASE, *arguments, "--allocator", "uniform")


def test_a_device_that_this_machine_lacks(folder: Path) -> None:
    assert "--device cuda:99: expected a device of this machine" in refused(2, *BASE, "--device", "cuda:99")
