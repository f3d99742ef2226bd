from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.main import get_command

from secateur.cli.main import app
from secateur.cli.shell import one_line
from tests.cli.conftest import run

COMMANDS = (
    "demo",
    "init",
    "inspect",
    "score",
    "plan",
    "apply",
    "prune",
    "repair",
    "compare",
    "tolerance",
    "transition",
)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"secateur {metadata.version('secateur')}\n"


def test_help_lists_the_commands_and_exit_codes() -> None:
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "2 bad input, 3 budget unreachable, 4 verification failed" in " ".join(text.split())


def test_without_a_command_help_is_shown() -> None:
    assert "Usage: secateur" in run().output


def example(command: str) -> list[str]:
    text = run(command, "--help").stdout
    found = re.search(r"^\s*Example: secateur (.*\S)\s*$", text, re.MULTILINE)
    assert found is not None, text  # in one line: to be pasted
    arguments = shlex.split(found[1])
    assert arguments[0] == command
    return arguments


def test_every_command_has_an_example() -> None:
    for command in get_command(app).commands:  # type: ignore[attr-defined]
        if command != "prune-checkpoint":  # its example takes two lines
            example(command)


@pytest.mark.slow
def test_the_examples_in_each_help_run_one_after_another(folder: Path) -> None:
    order = ("init", "inspect", "score", "plan", "apply", "repair")
    for command in (*order, *(each for each in COMMANDS if each not in order)):
        result = run(*example(command), *(["--quick"] if command == "demo" else []))
        assert result.exit_code == 0, (command, result.stderr)
        if command == "init":  # the example of plan reads its scores from the configuration
            text = (folder / "run.yaml").read_text()
            (folder / "run.yaml").write_text(text.replace("#scores:", "scores:"))
    assert {"run.yaml", "scores.safetensors", "plan.json", "small", "fixed", "demo"} <= {
        path.name for path in folder.iterdir()
    }


def test_an_unknown_option_is_bad_input() -> None:
    assert run("prune", "--nonsense").exit_code == 2


HEAVY = ("torch", "numpy", "pydantic", "yaml", "transformers")


def imported(folder: Path, *arguments: str) -> tuple[int, set[str]]:
    """The exit code of a command in a fresh process, and what of `HEAVY` it imported."""
    code = (
        "import sys\n"
        "from secateur.cli.main import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        f"    print('imported', end.code, *({HEAVY!r} & sys.modules.keys()))\n"
    ).replace(f"{HEAVY!r} &", f"set({HEAVY!r}) &")
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder)
    last = ran.stdout.splitlines()[-1].split()
    assert last[0] == "imported", ran.stdout + ran.stderr
    return int(last[1]), set(last[2:])


def test_help_needs_nothing_heavy(folder: Path) -> None:
    assert imported(folder, "--help") == (0, set())
    code, found = imported(folder, "prune", "--help")
    assert code == 0
    assert found <= {"pydantic"}  # which typer imports by itself


@pytest.mark.parametrize(
    "wrong",
    [
        ("--set", "budget.mac=0.5"),
        ("--macs", "2.5"),
        ("--removal", "nonsense"),
        ("--repair", "glue"),
        ("--round-to", "0"),
        ("--ratio", "0.5"),
        ("--config", "none.yaml"),
        ("--model", "nothing"),
        ("--data", "none.npz"),
        ("--out", "net.py"),
    ],
)
def test_a_wrong_setting_is_refused_before_torch_is_imported(folder: Path, wrong: tuple[str, str]) -> None:
    code, found = imported(
        folder, "prune", "--model", "net.py:make", "--data", "x.npz", "--out", "new", *wrong
    )
    assert code == 2
    assert not found & {"torch", "numpy", "transformers"}


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one", "one"),
        ("one\n  two\n\nthree", "one two three"),
        ("first.\n\na\nlong\ntable\nLast.", "first. ... Last."),
        ("", ""),
    ],
)
def test_errors_become_one_line(message: str, line: str) -> None:
    assert one_line(message) == line
