"""Change one thing in the core and see whether a test notices: ``python -m tests.mutants --count 200``.

A mutant is a copy of the package with one comparison, operator, constant, condition or statement changed. It
is killed if a test of its part fails or does not end; what survives is listed with its place in
``benchmarks/results/mutants.json``. Some survivors are no gaps: the change makes no difference, or only costs
time. Messages, annotations and docstrings are left alone. The mutants are drawn by the seed, so runs can be
repeated; rows of other runs stay in the file.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np  # noqa: F401  # what tests import is imported once, before the forks
import pytest
import torch  # noqa: F401

from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "secateur"
CORE = {
    "graph/labels.py": ("tests/graph",),
    "graph/splits.py": ("tests/graph",),
    "graph/walk.py": ("tests/graph",),
    "graph/assemble.py": ("tests/graph",),
    "graph/rules/*.py": ("tests/graph", "tests/targets/units/test_equality.py"),
    "allocators/*.py": ("tests/allocators", "tests/targets/weights", "tests/report"),
    "proof/*.py": ("tests/proof",),
}
"""Files of the core, and the tests that have to notice a change in them."""

PATIENCE = 5
"""A mutant with which the tests take so many times as long is killed: people would notice."""

OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: `old` of a file, at these lines and columns (in bytes), becomes `new`."""

    file: str
    start: tuple[int, int]
    end: tuple[int, int]
    old: str
    new: str

    def source(self) -> str:
        """The changed file."""
        lines = (PACKAGE / self.file).read_bytes().splitlines(keepends=True)
        (first, left), (last, right) = self.start, self.end
        before = b"".join(lines[: first - 1]) + lines[first - 1][:left]
        after = lines[last - 1][right:] + b"".join(lines[last:])
        return (before + self.new.encode() + after).decode()


def left_alone(node: ast.AST) -> bool:
    """Whether nothing in a node is changed: it says something to people, or only to a type checker."""
    checks_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return checks_types or isinstance(
        node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom
    )


def changed(node: ast.AST) -> ast.AST | None:
    """What a node is replaced by, if it is of a kind that is changed."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]) if type(op) in OTHER:
            new.ops = [OTHER[type(op)]()]  # type: ignore[list-item]
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OTHER:
            if any(
                isinstance(side, ast.Constant | ast.JoinedStr) and _is_text(side) for side in (left, right)
            ):
                return None
            new.op = OTHER[type(op)]()  # type: ignore[assignment]
        case ast.BoolOp(op=op):
            new.op = OTHER[type(op)]()  # type: ignore[assignment]
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return operand
        case ast.Constant(value=bool() as value):
            new.value = not value
        case ast.Constant(value=int() as value):
            new.value = value + 1
        case ast.Continue():
            return ast.Break()
        case ast.Break():
            return ast.Continue()
        case ast.Expr(value=ast.Call()):
            return ast.Pass()
        case _:
            return None
    return new


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def mutants(path: Path) -> Iterator[Mutant]:
    """All mutants of a file."""
    source = path.read_text()
    file = path.relative_to(PACKAGE).as_posix()

    def walk(node: ast.AST) -> Iterator[Mutant]:
        if left_alone(node):
            return
        new = changed(node)
        if new is not None and isinstance(node, ast.expr | ast.stmt):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            text = ast.unparse(new) if isinstance(new, ast.stmt) else f"({ast.unparse(new)})"
            yield Mutant(
                file, (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset),
                ast.get_source_segment(source, node) or "", text,
            )  # fmt: skip
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child)

    yield from walk(ast.parse(source))


def run(tests: Sequence[str], package: Path, seconds: float) -> str:
    """Run tests on a copy of the package, in a process of its own. Return how it ended.

    Args:
        tests: Files and folders of tests.
        package: The folder that holds the copy.
        seconds: How long it may take.
    """
    child = os.fork()
    if not child:
        os.setsid()
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        for name in [n for n in sys.modules if n.partition(".")[0] in ("secateur", "benchmarks", "tests")]:
            del sys.modules[name]  # what the parent imported is not the copy
        sys.path.insert(0, str(package))
        sys.dont_write_bytecode = True
        if not str(import_module("secateur").__file__).startswith(str(package)):
            os._exit(70)
        os._exit(pytest.main([*tests, "-xq", "-mnot cuda", "-pno:cacheprovider", "-pno:xdist"]))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "passed" if code == 0 else f"exit code {code}"
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"took over {PATIENCE} times as long"


class Suites:
    """The tests of each part of the core, and how long they take.

    Attributes:
        package: The folder that holds a copy of the package, which is changed and put back.
    """

    def __init__(self, package: Path) -> None:
        self.package = package
        self._seconds: dict[tuple[str, ...], float] = {}

    def end_of(self, mutant: Mutant, tests: tuple[str, ...]) -> str:
        """Run the tests on a mutant, those of the file's name first. Return how it ended."""
        if tests not in self._seconds:
            begun = time.monotonic()
            end = run(tests, self.package, 3600)
            if end != "passed":  # 70: the tests did not run on the copy
                raise SystemExit(f"{' '.join(tests)}: expected tests that pass without a change, got {end}.")
            self._seconds[tests] = time.monotonic() - begun
        near = f"{tests[0]}/test_{Path(mutant.file).stem}.py"
        target = self.package / "secateur" / mutant.file
        whole = target.read_text()
        target.write_text(mutant.source())
        try:
            order = [near] * (ROOT / near).is_file() + [*tests]
            return run(order, self.package, PATIENCE * self._seconds[tests])
        finally:
            target.write_text(whole)


def chosen(count: int, seed: int, part: str) -> list[tuple[Mutant, tuple[str, ...]]]:
    """Mutants drawn from all files of the core whose path starts with `part`, each with its tests."""
    found = []
    for pattern, tests in CORE.items():
        for path in sorted(PACKAGE.glob(pattern)):
            if path.relative_to(PACKAGE).as_posix().startswith(part):
                found += [(mutant, tests) for mutant in mutants(path)]
    print(f"{len(found)} mutants of {len({m.file for m, _ in found})} files; {count} are tried", flush=True)
    return random.Random(seed).sample(found, min(count, len(found)))


def main() -> None:
    """Try some mutants and write down what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="", help="only files whose path starts so, such as graph/rules")
    asked = parser.parse_args()
    rows = [
        r
        for r in (results.read("mutants") or {}).get("mutants", [])
        if (r["part"], r["seed"]) != (asked.part, asked.seed)
    ]
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / "secateur", ignore=shutil.ignore_patterns("__pycache__"))
        suites = Suites(Path(folder))
        for mutant, tests in chosen(asked.count, asked.seed, asked.part):
            begun = time.monotonic()
            how = suites.end_of(mutant, tests)
            alive = how == "passed"
            place = f"{mutant.file}:{mutant.start[0]}"
            row = {
                "part": asked.part,
                "seed": asked.seed,
                "place": place,
                "old": mutant.old,
                "new": mutant.new,
            }
            rows.append({**row, "survived": alive, "end": how})
            print(f"{'SURVIVED' if alive else 'killed'} {place} {mutant.old!r} -> {mutant.new!r}, "
                  f"{how}, {time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
            killed = sum(not r["survived"] for r in rows)
            results.write("mutants", {"tried": len(rows), "killed": killed, "mutants": rows})
    print(f"{killed} of {len(rows)} killed ({100 * killed / len(rows):.0f} %)")


if __name__ == "__main__":
    main()
