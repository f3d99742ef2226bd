from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateur.cli.inspect import listing
from tests.cli.conftest import refused, run
from tests.targets.experts.models import library

MIXTURE = """
from tests.targets.experts import models


def make():
    return models.make("mixtral")


def load():
    return [{"input_ids": part, "labels": part} for part in models.words(20, 16).chunk(5)]
"""


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


def test_single_weights_need_no_inputs(folder: Path) -> None:
    asked = ("inspect", "--model", "net.py:make", "--granularity", "weight")
    result = run(*asked)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    weights = 8 * 3 * 9 + 12 * 8 * 9 + 3 * 12
    assert lines[0] == "Sequential: 1,155 parameters"
    assert lines[1].startswith(f"{weights:,} of them, {weights / 1155:.1%}".replace("%", " %"))
    assert "in 3 tensors that a mask may set to zero" in lines[1]
    row = next(line.split() for line in lines if line.startswith("3.weight"))
    assert row == ["3.weight", "864", "74.8", "%", "12", "×", "8", "×", "3", "×", "3"]
    found = json.loads(run(*asked, "--json").stdout)
    assert found["weights"] == weights == sum(group["weights"] for group in found["groups"])
    assert found["granularity"] == "weight"
    assert found["alone"] == {}
    assert "with granularity 'weight'" in refused(2, *asked, "--allow-inexact")


def test_experts_and_both(folder: Path) -> None:
    library()
    (folder / "mixture.py").write_text(MIXTURE)
    asked = ("inspect", "--model", "mixture.py:make", "--data", "mixture.py:load", "--granularity")

    def shown(granularity: str) -> dict[str, Any]:
        result = run(*asked, granularity, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    experts, text = shown("expert"), run(*asked, "expert").stdout
    assert "16 experts in 2 groups may be removed. With the experts that its router needs left" in text
    assert text == f"{listing(experts)}\n"
    assert [(group["units"], group["fewest"]) for group in experts["groups"]] == [(8, 2), (8, 2)]
    # An expert: gate, up and down of 40 neurons at width 32, and its row of the router.
    assert experts["params"] - experts["groups"][0]["alone"]["params"] == 6 * (3 * 40 * 32 + 32)
    assert experts["coverage"] is None
    both = shown("unit+expert")
    assert "units and experts in" in listing(both)
    assert "of the parameters lie in layers with units that may be removed." in listing(both)
    by_kind = {
        kind: [g["name"] for g in both["groups"] if g["what"] == kind] for kind in ("units", "experts")
    }
    assert by_kind["experts"] == [group["name"] for group in experts["groups"]]
    assert by_kind["units"]
    assert both["smallest"]["params"] < experts["smallest"]["params"]


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
    assert "expected a folder with model.safetensors and secateur.json" in refused(2, "inspect", "small")


def test_a_folder_named_in_the_configuration_is_not_meant(folder: Path) -> None:
    (folder / "run.yaml").write_text("model: net.py:make\nartefact: small\ndata: net.py:load\n")
    result = run("inspect", "--config", "run.yaml")
    assert result.exit_code == 0, result.stderr
    assert "groups may be removed" in result.stdout


def test_batches_that_list_the_arguments(folder: Path) -> None:
    """Each command knows from the model that three entries are two inputs and labels."""
    (folder / "pairs.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "class Pairs(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.out = nn.Linear(5, 16), nn.Linear(4, 16), nn.Linear(16, 2)\n"
        "    def forward(self, a, b):\n"
        "        return self.out((self.a(a) * self.b(b)).relu())\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Pairs()\n"
        "def load():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    a, b = torch.randn(60, 5, generator=g), torch.randn(60, 4, generator=g)\n"
        "    return DataLoader(TensorDataset(a, b, torch.arange(60) % 2), 20)\n"
    )
    given = ("--model", "pairs.py:make", "--data", "pairs.py:load")
    for command in (
        ("inspect", *given),
        ("score", *given, "--out", "scores.json"),
        ("prune", *given, "--params", "0.6", "--allocator", "uniform", "--out", "small"),
        ("bench", "small", *given, "--rounds", "5"),
        ("export", "small", *given, "--out", "small.pt2"),
    ):
        result = run(*command)
        assert result.exit_code == 0, (command, result.stderr)
