from __future__ import annotations

import sys
from pathlib import Path

import pytest

from secateur.config.read import read_run
from secateur.config.run import Run
from secateur.config.setting import settings
from secateur.config.write import commented
from secateur.errors import SettingError


def test_options_win_over_set_which_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("budget:\n  macs: 0.7\n  params: 5000\nseed: 1\nbatch_size: 8\nlimits:\n")
    run = read_run(file, ["seed=2", "batch_size=16"], {"batch_size": ("--batch-size", "32")})
    assert (run.budget.macs, run.budget.params, run.seed, run.batch_size) == (0.7, 5000, 2, 32)
    assert run.limits == Run().limits
    assert read_run() == Run()


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("budget.macs=0.25", "budget.macs", 0.25),
        ("budget.macs=1e-2", "budget.macs", 0.01),
        ("budget.macs=1000000", "budget.macs", 1_000_000),
        ("budget.macs=null", "budget.macs", None),
        ("budget.spend=false", "budget.spend", False),
        ("limits.ignore=[stem, 3]", "limits.ignore", ("stem", "3")),
        ("limits.ignore=3", "limits.ignore", ("3",)),
        ("repair=reconstruct, batchnorm", "repair", ("reconstruct", "batchnorm")),
        ("removal=l1*wasserstein", "removal", "l1*wasserstein"),
        ("model=timm:resnet18", "model", "timm:resnet18"),
        ("memory=1000", "memory", "1000"),
        ("limits.round_to=8", "limits.round_to", 8),
        ("limits.round_to=measured", "limits.round_to", "measured"),
        ("input=[1x3x8x8, 1x2:int64]", "input", ("1x3x8x8", "1x2:int64")),
        ("compare.macs=0.8,0.25", "compare.macs", (0.8, 0.25)),
        ("images.mean=0.5", "images.mean", (0.5,)),
    ],
)
def test_text_becomes_what_it_stands_for(text: str, path: str, value: object) -> None:
    found: object = read_run(sets=[text])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "expected name=value"),
        ("budget.mac=0.5", "Did you mean budget.macs"),
        ("macs=0.5", "Did you mean budget.macs|Did you mean compare.macs"),
        ("limits=3", "expected a known setting, got limits"),
        ("seed=[", "expected a value as in YAML"),
        ("seed=x", "--set seed x: expected a whole number, got 'x'"),
        ("budget.macs=half", "--set budget.macs half: expected a fraction or a count, got 'half'"),
        ("budget.macs=1.5", "--set budget.macs: expected macs to be a fraction"),
        ("budget.params=0", "--set budget.params: expected params to be a fraction"),
        ("budget.sparsity=1", "expected a number above 0 and below 1, got 1"),
        ("allow_inexact=maybe", "expected true or false, got 'maybe'"),
        (
            "granularity=layer",
            r"expected one of unit, weight, expert, unit\+expert, block, unit\+block, .*, got 'layer'",
        ),
        ("compare.rules=[tod, best]", "compare.rules best: expected one of auto"),
        ("removal=l1*fish", "removal l1\\*fish: expected one of .* with \\* or \\+ between"),
        ("tolerance=1.5", "tolerance 1.5: expected a number of at least 0 and of at most 1"),
        ("ratio=0.5", "--set ratio: expected it with allocator uniform, got auto"),
        ("parts=4", "--set parts: expected it with allocator repair_aware, got auto"),
        ("repair=auto,bias", "expected auto, none or other names"),
        ("repair=glue", "--set repair glue: expected one of auto"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        read_run(sets=[text])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a", "expected names and values, got list"),
        ("budget: 3", "expected names and values under budget, got 3"),
        ("budget:\n  mac: 3", "got budget.mac. Did you mean budget.macs"),
        ("modle: x", "got modle. Did you mean model"),
        ("seed: [1, 2", "expected YAML"),
        ("seed: x", "run.yaml: seed x: expected a whole number"),
        (
            "tolerance: 0.1\nbudget:\n  macs: 0.5",
            "run.yaml: tolerance: expected either a tolerance or a budget",
        ),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(SettingError, match=said):
        read_run(file)
    with pytest.raises(SettingError, match="no file that can be read"):
        read_run(tmp_path / "other.yaml")


def test_a_file_may_be_json_or_toml(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"budget": {"macs": 0.25},\n\t"limits": {"ignore": ["stem"]}}')
    (tmp_path / "run.toml").write_text('[budget]\nmacs = 0.25\n[limits]\nignore = ["stem"]\n')
    expected = read_run(sets=["budget.macs=0.25", "limits.ignore=stem"])
    assert read_run(tmp_path / "run.json") == expected
    (tmp_path / "wrong.json").write_text("{")
    with pytest.raises(SettingError, match="expected JSON"):
        read_run(tmp_path / "wrong.json")
    if sys.version_info < (3, 11):
        with pytest.raises(SettingError, match=r"needs Python 3\.11"):
            read_run(tmp_path / "run.toml")
    else:
        assert read_run(tmp_path / "run.toml") == expected
        (tmp_path / "wrong.toml").write_text("seed")
        with pytest.raises(SettingError, match="expected TOML"):
            read_run(tmp_path / "wrong.toml")


def test_what_init_writes_changes_nothing_and_names_every_setting(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(commented({}))
    assert read_run(file) == Run()
    text = file.read_text()
    for path, setting in settings().items():
        leaf = path.rpartition(".")[2]
        assert f"#{leaf}: " in text, path
        assert setting.help.split()[0] in text
    file.write_text(commented({"model": "net.py:make", "budget.macs": 0.5}))
    run = read_run(file)
    assert (run.model, run.budget.macs) == ("net.py:make", 0.5)


def alone(path: str, text: str) -> str:
    """The configuration with one setting uncommented."""
    section, _, leaf = path.rpartition(".")
    inside, lines = "", []
    for line in text.splitlines():
        if line and not line.startswith((" ", "#")):
            inside = line.rstrip(":")
        elif line.startswith("#"):
            inside = ""
        start = ("  #" if section else "#") + f"{leaf}: "
        lines.append(line.replace("#", "", 1) if inside == section and line.startswith(start) else line)
    return "\n".join(lines)


@pytest.mark.parametrize("path", list(settings()))
def test_each_line_of_init_can_be_uncommented(tmp_path: Path, path: str) -> None:
    needs = {
        "ratio": ["allocator=uniform"],
        "protection": ["allocator=tod"],
        "parts": ["allocator=repair_aware"],
        "polish_passes": ["repair=polish"],
    }
    file = tmp_path / "run.yaml"
    file.write_text(alone(path, commented({})))
    found: object = read_run(file, needs.get(path, []))
    for name in path.split("."):
        found = getattr(found, name)
    setting = settings()[path]
    expected = tuple(setting.example) if isinstance(setting.example, list) else setting.example
    assert found == expected
    assert found not in (None, ())


@pytest.mark.parametrize("value", ["quick", "0", "1.5"])
def test_a_number_or_a_word(value: str) -> None:
    with pytest.raises(SettingError, match=f"expected a number of at least 1 or measured, got '?{value}'?"):
        read_run(sets=[f"limits.round_to={value}"])
