"""Shared by all commands: exit codes, errors in one line, and where output goes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.entry import INTERRUPTED, LINE
from secateur.common.inert import inert
from secateur.errors import LONGEST, SecateurError, UnreachableBudgetError, VerificationError

BUG, BAD_INPUT, UNREACHABLE, NOT_PROVEN = 1, 2, 3, 4

Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed for all random choices: the same seed gives the same plan.")]


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Turn an error into one line on stderr and an exit code.

    Whatever the block prints goes to stderr, also what the user's own code prints: stdout is for the result.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt as error:
        if debug:
            raise
        typer.echo(LINE, err=True)
        raise typer.Exit(INTERRUPTED) from error
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, SecateurError)
        line = (
            one_line(str(error))
            if known
            else f"unexpected {type(error).__name__}: {one_line(str(error))[:LONGEST]}"
        )
        show(f"secateur: {line}" + ("" if known else " (--debug shows where)"), err=True)
        raise typer.Exit(_code(error)) from error


def show(text: str, *, err: bool = False) -> None:
    """Print text, in which names of files and models may stand: nothing in it acts on the terminal."""
    typer.echo(inert(text), err=err)


def _code(error: Exception) -> int:
    if isinstance(error, UnreachableBudgetError):
        return UNREACHABLE
    if isinstance(error, VerificationError):
        return NOT_PROVEN
    return BAD_INPUT if isinstance(error, SecateurError) else BUG


def one_line(message: str) -> str:
    r"""Join a message into one line. Of more than three lines, only the first and the last are kept.

    They say what was wrong and what to do.

    Example:
        >>> one_line("found none.\n\na table\nof\nmany rows\nDo this.")
        'found none. ... Do this.'
    """
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    if len(lines) > 3:
        lines = [lines[0], "...", lines[-1]]
    return " ".join(lines)


def python_command(code: str) -> str:
    """Return a shell command that runs `code` with the current Python.

    The code is put in double quotes if that is safe, because all shells treat them alike.
    """
    quoted = f'"{code}"' if re.fullmatch(r"[\w ./,:;()'=-]*", code) else shlex.quote(code)
    return f"{_python()} -c {quoted}"


def _python() -> str:
    """Return ``python`` if the shell would find the current one; otherwise its path."""
    found = shutil.which("python")
    if found is not None and os.path.abspath(found) == os.path.abspath(sys.executable):
        return "python"
    try:
        path = str(Path(os.path.abspath(sys.executable)).relative_to(Path.cwd()))
    except ValueError:
        path = sys.executable
    return path if re.fullmatch(r"[\w./\\:-]+", path) else shlex.quote(path)
