"""What is no path, or no place for a file, is refused in words by every call that takes one."""

from __future__ import annotations

import ast
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from secateur.common import reading
from secateur.errors import LONGEST
from secateur.integrations.shapes import read_shape, write_shape
from tests.helpers.hostile import GRAPH, MASKS, NET, PLAN, SCORES, SMALL, make
from tests.report.reports import report

DATA = [(torch.randn(8, 4), torch.arange(8) % 2)]
QUIET: Any = {"progress": False}

READ: dict[str, Callable[[Any], Any]] = {
    "load": lambda p: sc.load(p, make),
    "plan": sc.Plan.from_json,
    "scores": sc.Scores.load,
    "masks": sc.MaskPlan.load,
    "report": sc.Report.from_json,
    "map_weights": lambda p: sc.map_weights(make(), p),
    "read_shape": read_shape,
    "prune_checkpoint": lambda p: sc.prune_checkpoint(p, PLAN, "out"),
}
WRITE: dict[str, Callable[[Any], Any]] = {
    "plan": PLAN.to_json,
    "scores": SCORES.save,
    "masks": lambda p: sc.MaskPlan(GRAPH.fingerprint, "hand", MASKS).save(p),
    "report": lambda p: report().to_json(p),
    "page": lambda p: report().to_html(p),
    "markdown": lambda p: report().to_markdown(p),
    "export": lambda p: sc.export(SMALL, p, torch.zeros(2, 4)),
    "save": lambda p: sc.save(SMALL, p),
    "write_shape": lambda p: write_shape(SMALL, p),
    "score": lambda p: sc.score(GRAPH, DATA, "taylor", checkpoint=p, **QUIET),
    "prune": lambda p: sc.prune(
        NET, DATA * 4, sc.Budget(macs=0.6), "tod", checkpoint=p, measure_latency=False, **QUIET
    ),
    "prune_checkpoint": lambda p: sc.prune_checkpoint("none", PLAN, p),
}
NO_PATHS = (3, True, 1.5, b"abc", b"", object(), [], ["a"], "")
NO_FILES = ("\0", "a\0b", "x" * 300, "x/" * 3000, "file/below", "loop/x", "null/x", "\ud800")
PATHLIB = (".is_file", ".is_dir", ".exists")
NO_REGULAR_FILES = ("fifo", "socket", "null", "to null", "to fifo")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with odd things in it."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("old")
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("to fifo").symlink_to("fifo")
    Path("to null").symlink_to("null")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    try:
        os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # never the system's own
    except OSError:  # only the administrator may
        os.mkfifo("null")
    return tmp_path


def _seen(place: Path) -> dict[str, tuple[int, bytes]]:
    files = {p.name: os.lstat(p).st_mode for p in place.iterdir() if p.name != "out"}
    return {n: (m, Path(n).read_bytes() if stat.S_ISREG(m) else b"") for n, m in files.items()}


def _refused(call: Callable[[Any], Any], path: Any) -> None:
    with pytest.raises(sc.SecateurError, match="expected") as caught:
        call(path)
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("name", READ)
def test_readers(name: str, place: Path) -> None:
    before = _seen(place)
    places = () if name == "read_shape" else (*NO_FILES, *NO_REGULAR_FILES)  # no file there: nothing went
    for path in (None, *NO_PATHS, *places):
        _refused(READ[name], path)
    assert _seen(place) == before


@pytest.mark.parametrize("name", WRITE)
def test_writers(name: str, place: Path) -> None:
    before = _seen(place)
    for path in (*NO_PATHS, *NO_FILES, *NO_REGULAR_FILES):
        if not (name == "export" and path in NO_REGULAR_FILES[:3]):  # refused, as the format is not known
            _refused(WRITE[name], path)
        assert _seen(place) == before, path


def test_devices_among_the_files_of_an_artefact_stay(place: Path) -> None:
    sc.save(SMALL, "a")
    Path("a/model.safetensors").unlink()
    os.mkfifo("a/model.safetensors")
    _refused(WRITE["save"], "a")
    assert stat.S_ISFIFO(os.lstat("a/model.safetensors").st_mode)


def test_blocks_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken disk, or a file system that is gone."""
    SCORES.save(tmp_path / "scores")
    PLAN.to_json(tmp_path / "plan.json")
    sc.save(SMALL, tmp_path / "a")

    def broken(self: Any, read: Callable[..., Any], *args: Any) -> Any:
        def fails(*_: Any) -> Any:
            raise OSError(5, "Input/output error")

        return original(self, fails, *args)

    original = reading._Checked._try
    monkeypatch.setattr(reading._Checked, "_try", broken)
    for read in (
        lambda: sc.Scores.load(tmp_path / "scores"),
        lambda: sc.Plan.from_json(tmp_path / "plan.json"),
        lambda: sc.load(tmp_path / "a", make),
        lambda: sc.map_weights(make(), tmp_path / "a"),
    ):
        with pytest.raises(sc.SecateurError, match="Input/output error"):
            read()


def test_nothing_asks_pathlib_what_is_there() -> None:
    """Its questions raise where a name is too long or a folder is closed; those of `os.path` answer."""
    found = []
    for file in sorted(Path(sc.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(PATHLIB):
                if (
                    ast.unparse(node.func) != "os.path.exists" and not node.keywords
                ):  # those are of os.scandir
                    found.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


@pytest.mark.parametrize(
    "write", [SCORES.save, lambda p: sc.score(GRAPH, DATA, "taylor", checkpoint=p, **QUIET)]
)
def test_a_folder_that_this_user_may_not_look_into_is_not_called_missing(
    write: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def stat_as_nobody(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat_as_nobody)
    with pytest.raises(sc.SecateurError, match=r"got no permission to look\. Name another"):
        write(tmp_path / "inside" / "file")
