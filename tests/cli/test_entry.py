"""A signal ends a command in one line, whatever it is doing."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import typer

from secateur.artefact.writing import replacing
from secateur.cli.entry import LINE, stoppable
from secateur.cli.shell import reported


def ends(command: Callable[[], object]) -> Any:
    with pytest.raises(SystemExit) as end:
        stoppable(command)
    return end.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_code_and_the_line(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def writes() -> None:
        with replacing(tmp_path / "new") as partial:
            partial.write_text("half")
            signal.raise_signal(number)

    def reports() -> None:
        try:
            with reported(debug=False):
                writes()
        except typer.Exit as end:  # which typer turns into this
            sys.exit(end.exit_code)

    for command in (writes, reports):
        assert ends(command) == 128 + number
        assert capsys.readouterr().err == f"{LINE}\n"
        assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("code", [0, 2, 130])
def test_without_a_signal_nothing_changes(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(lambda: sys.exit(code)) == code
    assert ends(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        stoppable(lambda: 1 / 0)
    assert capsys.readouterr().err == ""


def test_an_exception_that_hides_the_signal(capsys: pytest.CaptureFixture[str]) -> None:
    def hides() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("a library") from error

    assert ends(hides) == 130
    assert capsys.readouterr().err == f"{LINE}\n"


def test_in_the_middle_of_an_import_it_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\n")
    monkeypatch.syspath_prepend(tmp_path)
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", leave)
    assert ends(lambda: __import__("slow_to_import")) == 143
    assert codes == [143]


def test_signals_that_are_ignored_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    handler: Callable[[int, FrameType | None], Any] | int | None = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )
    try:
        assert ends(lambda: signal.raise_signal(signal.SIGINT)) == 0
    finally:
        signal.signal(signal.SIGINT, handler)


def test_python_runs_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["secateur", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("secateur", run_name="__main__")
    assert end.value.code in (None, 0)
    assert "inspect" in capsys.readouterr().out
