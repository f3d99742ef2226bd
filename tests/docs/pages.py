"""The code on the pages of docs/, and a reader who does what they say, line by line."""

from __future__ import annotations

import doctest
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from tests.cli.conftest import run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
SHOWN = frozenset({"text", "math", "toctree", "eval-rst", "figure", "image", "note", "warning", "tip"})
"""What is no code."""

_FENCE = re.compile(r"^(?P<ticks>```+)(?P<head>[^\n]*)\n(?P<body>.*?)^(?P=ticks)$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r"^:(\w+): *(.*)\n", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: After the backticks.
        file: The file that its caption names; empty if it has none.
        text: What is in it.
        where: The page and the line of its first backtick.
    """

    language: str
    file: str
    text: str
    where: str


def pages() -> list[Path]:
    """All pages that are written by hand."""
    return sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def blocks_of(page: Path) -> Iterator[Block]:
    """Its blocks, in order."""
    content = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(content):
        head, text, file = found["head"].strip(), found["body"], ""
        if head.startswith("{"):
            directive, _, argument = head[1:].partition("}")
            head = argument.strip() if directive == "code-block" else directive
            options = re.match(rf"(?:{_OPTION.pattern})*", text)
            given = dict(_OPTION.findall(options[0])) if options else {}
            file, text = given.get("caption", ""), text[options.end() :] if options else text
        line = content.count("\n", 0, found.start()) + 1
        yield Block(head, file, text.lstrip("\n"), f"{page.relative_to(ROOT)}:{line}")


class Reader:
    """Somebody who follows a page in the current folder."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {"__name__": "__main__"}

    def follow(self, block: Block) -> None:
        """Write the file, run the code or the commands; what is shown has to come out."""
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python" and ">>>" in block.text:
            self._session(block)
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), self.scope)
        elif block.language == "sh":
            for line in _lines(block.text):
                self._command(line, block.where)
        elif block.language == "console":
            self._console(block)
        else:
            assert block.language in SHOWN, f"{block.where}: nothing says what to do with {block.language!r}"

    def _session(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(block.text, self.scope, block.where, block.where, 0)
        said: list[str] = []
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        runner.run(test, out=said.append, clear_globs=False)
        self.scope.update(test.globs)
        assert not runner.failures, "".join(said)

    def _console(self, block: Block) -> None:
        """Commands behind ``$``, and under each what it prints, as in a doctest; nothing: anything."""
        assert block.text.startswith("$ "), f"{block.where}: expected a command behind a dollar sign"
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, wanted = part.replace("\\\n", " ").partition("\n")
            got = self._command(line, block.where)
            if wanted.strip():
                checker = doctest.OutputChecker()
                assert checker.check_output(wanted, got, OPTIONS), f"{block.where}: $ {line}\n{got}"

    def _command(self, line: str, where: str) -> str:
        """What a command prints on stdout. What only installs or measures is checked, not run."""
        program, *arguments = shlex.split(line, comments=True)
        if program == "secateur":
            result = run(*arguments)
            assert result.exit_code == 0, f"{where}: $ {line}\n{result.output}"
            return result.stdout
        if program == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{where}: $ {line}\n{done.stderr}"
            return done.stdout
        if program == "python" and arguments[0] == "-m":
            assert (ROOT / (arguments[1].replace(".", "/") + ".py")).is_file(), f"{where}: {line}"
            return ""
        if program == "python":
            with redirect_stdout(StringIO()) as said:
                runpy.run_path(arguments[0], run_name="__main__")
            return said.getvalue()
        if program == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments), where
            return ""
        assert program == "pip", f"{where}: nothing says how to run {line!r}"
        extras = [name for found in re.findall(r"\[([\w,]+)\]", line) for name in found.split(",")]
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extras), f"{where}: {line}"
        return ""


def _lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line
