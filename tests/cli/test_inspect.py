from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import refused, run


def test_it_lists_groups_and_what_is_left(folder: Path) -> None:
    result = run("inspect", "--model", "net.py:make", "--input", "1x3x6x6")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    # 3·8·9 + 8·12·9 multiplications a pixel, 36 pixels, and the head.
    assert lines[0] == "Sequential: 1,155 parameters, 38,916 MACs for one sample"
    assert lines[1].startswith("20 units in 2 groups may be removed.")
    assert any(line.split()[:2] == ["3", "12"] for line in lines)
    assert any(line.startswith("  model output: 7.weight axis 0, 7.bias axis 0") for line in lines)


def test_json_holds_costs_that_add_up(folder: Path) -> None:
    result = run("inspect", "--model", "net.py:make", "--data", "net.py:load", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["macs"] == 36 * 9 * (3 * 8 + 8 * 12) + 12 * 3
    # One unit left in each group: 3·1·9 + 1·1·9 multiplications a pixel, and 1·3.
    assert found["smallest"]["macs"] == 36 * 9 * (3 + 1) + 3
    first, second = found["groups"]
    assert (first["name"], first["units"], first["produced_by"]) == ("0", 8, ["0.weight", "0.bias"])
    assert first["read_by"] == ["3.weight"]
    assert first["alone"]["macs"] == 36 * 9 * (3 + 12) + 12 * 3
    assert second["alone"]["macs"] == 36 * 9 * (3 * 8 + 8) + 3
    assert {frozen["reason"] for frozen in found["frozen"]} == {"model input input", "model output"}


def test_several_inputs_and_dtypes(folder: Path) -> None:
    (folder / "words.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Words(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 7), nn.Linear(7, 2)\n"
        "    def forward(self, ids, weight):\n"
        "        return self.head(torch.relu(self.inner(self.table(ids).mean(1) * weight)))\n"
    )
    arguments = ("inspect", "--model", "words.py:Words", "--input", "2x5:int64", "--input", "2x1", "--json")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert 7 in [group["units"] for group in json.loads(result.stdout)["groups"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected --input or --data, got neither"),
        (("--input", "1,3,6"), "Write 1x3x224x224 or 1x16:int64"),
        (("--input", "1x3:float33"), "Write 1x3x224x224"),
        (("--input", "0x3"), "Write 1x3x224x224"),
        (("--input", "1x4x6x6"), "expected model(*example_inputs) to run"),
    ],
)
def test_bad_input_ends_with_2(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(2, "inspect", "--model", "net.py:make", *arguments)


def test_nothing_to_prune_is_one_line(folder: Path) -> None:
    line = refused(2, "inspect", "--model", "net.py:single", "--input", "1x3x2x2")
    assert "found none" in line
    assert "granularity" in line


def test_a_pruned_models_folder(folder: Path) -> None:
    pruned = run(
        *("prune", "--model", "net.py:make", "--data", "net.py:load", "--macs", "0.6"),
        *("--allocator", "uniform", "--out", "small"),
    )
    assert pruned.exit_code == 0, pruned.stderr
    shown = run("inspect", "small")
    assert shown.exit_code == 0, shown.stderr
    said = next(line for line in shown.stdout.splitlines() if line.startswith("sizes of the inputs: "))
    assert "You may change the batch size (axis 0 of input: " in said
    assert "form module" in shown.stdout
    found = json.loads(run("inspect", "small", "--json").stdout)
    assert said.endswith(found["takes"])
    assert found["plan"]["allocator"] == "uniform"


def test_a_folder_is_inspected_alone(folder: Path) -> None:
    assert "expected a folder alone, got --model too" in refused(
        2, "inspect", "small", "--model", "net.py:make"
    )
    assert "got no model.safetensors" in refused(2, "inspect", "small")


def test_a_folder_named_in_the_configuration_is_not_meant(folder: Path) -> None:
    (folder / "run.yaml").write_text("model: net.py:make\nartefact: small\ndata: net.py:load\n")
    result = run("inspect", "--config", "run.yaml")
    assert result.exit_code == 0, result.stderr
    assert "groups may be removed" in result.stdout
