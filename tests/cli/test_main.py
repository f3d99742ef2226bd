from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from secateur.cli.shell import one_line
from tests.cli.conftest import run

COMMANDS = ("demo", "inspect", "prune", "tolerance")


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


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_each_help_runs(folder: Path, command: str) -> None:
    text = run(command, "--help").stdout
    found = re.search(r"^\s*Example: secateur (.*\S)\s*$", text, re.MULTILINE)
    assert found is not None, text  # in one line: to be pasted
    arguments = shlex.split(found[1])
    assert arguments[0] == command
    result = run(*arguments, *(["--quick"] if command == "demo" else []))
    assert result.exit_code == 0, result.stderr


def test_an_unknown_option_is_bad_input() -> None:
    assert run("prune", "--nonsense").exit_code == 2


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, secateur.cli.main; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


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
