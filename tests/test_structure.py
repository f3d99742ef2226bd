"""What the folders promise each other: who may read what, and where state may live."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import secateur

SOURCE = Path(secateur.__file__).parent

INSIDE = {
    f"secateur.graph.{name}" for name in ("assemble", "labels", "rules.op", "rules.weights", "splits", "walk")
}
"""What `trace` works with. Other packages ask the `Graph` that comes out of it."""

FLOW = (
    "graph",
    "stream",
    "signals",
    "allocators",
    "group_decision",
    "plan",
    "targets",
    "repairs",
    "proof",
    "pipeline",
    "report",
)
"""The pipeline, left to right: a module imports from what stands to its left."""

BACKWARDS = {
    ("graph/trace.py", "targets"),  # the table of granularities
    ("signals/scoring.py", "targets"),  # the same
    ("allocators/base.py", "plan"),  # a rule makes a plan
    ("allocators/base.py", "targets"),  # for single weights, masks
    ("allocators/unit_distortions.py", "repairs"),  # measures what a repair leaves
    ("signals/units/reconstruction.py", "repairs"),  # the same, for each unit
    *(
        (f"signals/units/{name}.py", "repairs") for name in ("columns", "input_features", "readers")
    ),  # layers as regressions
    ("signals/weights/score.py", "targets"),  # reads the layers that masks can cover
    *(
        (f"signals/experts/{name}.py", "targets")  # read the blocks of experts and their routers
        for name in ("outputchange", "score", "signal", "specialisation", "taylor", "weightnorm")
    ),
    *(
        (f"signals/blocks/{name}.py", "targets")  # read the residual blocks
        for name in ("score", "signal")
    ),
    *(
        (f"targets/{name}.py", "proof")  # their `verify`, and inputs of all sizes to try removals on
        for name in (
            "blocks/apply",
            "blocks/trace",
            "experts/apply",
            "lowrank/apply",
            "together/apply",
            "together/blocks",
            "weights/apply",
        )
    ),
    *(
        (f"targets/{name}.py", "repairs")  # solve the same least-squares problems
        for name in (
            "blocks/repair",
            "experts/repair",
            "lowrank/basis",
            "lowrank/repair",
            "together/blocks",
            "weights/projections",
            "weights/surgeon",
            "weights/transition",
        )
    ),
    *(
        (f"pipeline/{name}.py", "report")  # `prune` returns a report
        for name in ("compare", "prune", "quantise", "result", "targets/target", "targets/weights")
    ),
}
"""Modules that import from their right, and why. Nothing may join them; what leaves them is taken off."""

NOT_FROZEN = {("targets/units/record.py", "model"), ("common/outputs.py", "rebuilt")}
"""Objects that `object.__setattr__` is called on from outside: a module, and a copy that is being made."""

REMEMBERED = {
    ("report/html.py", "_template"),
    ("config/setting.py", "sections"),
    ("config/setting.py", "settings"),
    ("targets/units/module_form/recording.py", "_starts"),
    ("targets/units/module_form/recording.py", "literals"),
}
"""Functions whose answers are kept: of a class, of compiled code or of our own files. None can change."""

WRITERS = {
    "artefact/writing.py",  # the one that writes
    "artefact/pair.py",  # two files of one artefact, by means of that one
    "artefact/save.py",
    "artefact/export/huggingface.py",
    "artefact/export/owncode.py",
    "artefact/export/program.py",
    "artefact/export/quantising.py",
    "cli/output.py",
    "report/plot.py",
    "signals/journal.py",
    "signals/storage.py",
    "targets/experts/checkpoint.py",  # all of these into a folder or a file that it gives them
    "common/mapped.py",  # temporary files without a name
    "stream/pending.py",  # temporary files in a folder of `tempfile`
}
"""The modules that call something that changes files."""

WRITES = {
    *(
        "chmod",
        "copyfile",
        "copy2",
        "link",
        "mkdir",
        "mkstemp",
        "rename",
        "rmdir",
        "rmtree",
        "savefig",
        "save_file",
    ),
    *("symlink", "symlink_to", "touch", "truncate", "unlink", "write_bytes", "write_text"),
}
"""Functions that change files, beside `open` and `os.replace`."""

CONTAINERS = {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "defaultdict", "dict", "list", "set"}

FILLED = {("graph/rules/registry.py", "RULES"), ("targets/units/module_form/attention.py", "_CLASSES")}
"""Tables that functions may fill: what decorators register at import, and one class for each other class."""


def sources() -> dict[str, str]:
    """The text of each module by its path in the package."""
    return {str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


def own_names(text: str) -> set[str]:
    """Private names of attributes that a module defines: fields, methods, and what is set on ``self``."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            found |= {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
            found |= {
                f.target.id
                for f in node.body
                if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
            }
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def writes(text: str) -> Iterator[str]:
    """What a module calls to change files."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name in WRITES or called == "os.replace":
            yield called
        elif name == "open" and any(
            re.fullmatch("[wxar]b?[+]?b?", m) and m[0] + m[-1:] != "rb" for m in modes
        ):
            yield called


def reached_into(path: str, text: str, private: set[str]) -> Iterator[str]:
    """Where a module outside of ``graph/`` imports the insides of tracing, or reads their private names."""
    if path.startswith("graph/"):
        return
    mine = own_names(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module in INSIDE:
            yield f"{path}:{node.lineno}: from {node.module}"
        if isinstance(node, ast.Import):
            yield from (f"{path}:{node.lineno}: import {n.name}" for n in node.names if n.name in INSIDE)
        if isinstance(node, ast.Attribute) and node.attr in private - mine:
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def backwards(path: str, text: str) -> Iterator[tuple[str, str]]:
    """Where a module of the pipeline imports from its right, except for types."""
    here = path.split("/")[0].removesuffix(".py")
    if here not in FLOW:
        return
    tree = ast.parse(text)
    types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in types:
            package, _, rest = (node.module or "").partition(".")
            there = rest.split(".")[0]
            if package == "secateur" and there in FLOW[FLOW.index(here) + 1 :]:
                yield path, there


def set_from_outside(path: str, text: str) -> Iterator[str]:
    """Where a module sets an attribute of another object past its class, which may be frozen."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            target = ast.unparse(node.args[0])
            if target != "self" and (path, target) not in NOT_FROZEN:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def caches(path: str, text: str) -> Iterator[str]:
    """Where a module keeps what it has learnt: in a container of its own, or of one of its functions."""
    tree = ast.parse(text)
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            name = ast.unparse(node.value)
            if name in names and (path, name) not in FILLED:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (path, node.name) not in REMEMBERED:
            yield from (
                f"{path}:{node.lineno}: {node.name}"
                for decorator in node.decorator_list
                if "cache" in ast.unparse(decorator)
            )
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            value = node.value
            empty = (isinstance(value, ast.Dict) and not value.keys) or (
                isinstance(value, ast.List) and not value.elts
            )
            name = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
            made = name.split("[")[0].split(".")[-1] in CONTAINERS
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets if empty or made else ():
                if (path, ast.unparse(target)) not in FILLED:
                    yield f"{path}:{node.lineno}: {ast.unparse(target)}"


def test_nothing_reaches_into_the_graph() -> None:
    every = sources()
    private = set().union(*(own_names(text) for path, text in every.items() if path.startswith("graph/")))
    assert {"_labelled", "_assembled", "_costs", "_walk"} <= private
    assert [found for path, text in every.items() for found in reached_into(path, text, private)] == []


def test_data_flow_one_way() -> None:
    assert {found for path, text in sources().items() for found in backwards(path, text)} == BACKWARDS


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from secateur.pipeline.result import clock", 1),
        ("def f():\n    from secateur.report import text", 1),
        ("if TYPE_CHECKING:\n    from secateur.pipeline.result import Result", 0),
        ("from secateur.signals import Scores", 0),
        ("from secateur.common.models import unwrap", 0),
    ],
)
def test_an_import_from_the_right_is_found(text: str, found: int) -> None:
    assert len(list(backwards("targets/new.py", text))) == found


def test_nothing_frozen_is_set_from_outside() -> None:
    assert [found for path, text in sources().items() for found in set_from_outside(path, text)] == []


def test_no_module_keeps_what_it_has_learnt() -> None:
    assert [found for path, text in sources().items() for found in caches(path, text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "from secateur.graph.walk import walk",
        "import secateur.graph.labels",
        "def f(graph):\n    return graph._labelled",
        "def f(graph):\n    return graph.kept({})._walk.values",
    ],
)
def test_reaching_in_is_found(text: str) -> None:
    private = {"_labelled", "_walk"}
    assert len(list(reached_into("signals/new.py", text, private))) == 1
    assert list(reached_into("graph/new.py", text, private)) == []


@pytest.mark.parametrize("text", ["object.__setattr__(plan, 'x', 1)", "object.__setattr__(a.b, 'x', 1)"])
def test_setting_is_found(text: str) -> None:
    assert len(list(set_from_outside("plan.py", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "_known: WeakKeyDictionary[Graph, int] = WeakKeyDictionary()",
        "_known = weakref.WeakKeyDictionary()",
        "_known = {}",
        "_known: list[int] = []",
        "_known = defaultdict[str, int]()",
        "_known = {1: 2}\ndef f(x):\n    _known[x] = 1",
        "@cache\ndef f(x): ...",
        "@functools.lru_cache(maxsize=8)\ndef f(x): ...",
    ],
)
def test_a_cache_is_found(text: str) -> None:
    assert len(list(caches("signals/new.py", text))) == 1


def test_all_files_are_written_in_one_way() -> None:
    found = {path for path, text in sources().items() if [*writes(text)]}
    assert found == WRITERS
    assert [*writes("Path(x).open('wb'); os.replace(a, b); open(p, 'rb'); p.write_text(t)")] == [
        "Path(x).open",
        "os.replace",
        "p.write_text",
    ]


def test_what_is_listed_as_slow_exists() -> None:
    tests = Path(__file__).parent
    lines = [line for line in (tests / "slow.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(set(lines))
    for line in lines:
        path, _, name = line.partition("::")
        function = name.partition("[")[0].removesuffix(" 1 of 3")
        assert f"def {function}(" in (tests / path).read_text(), line
