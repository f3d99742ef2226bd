"""Whenever a command is interrupted, what it writes is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import secateur as sc
from secateur.artefact.pair import folder_in_place
from secateur.artefact.writing import replacing
from tests.cli.conftest import run

Files = dict[str, bytes]
PRUNE = ("--model", "net.py:make", "--data", "net.py:load", "--macs", "0.5", "--out", "small")


def content(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


class Interrupting:
    """Raises KeyboardInterrupt at one of all calls that change files, before it or after it."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, after: bool) -> None:
        self.at, self.after, self.count = at, after, 0
        saving = sys.modules["secateur.artefact.save"]  # `sc.save` is the function
        for owner, name in [
            (os, "replace"),
            (os, "link"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (saving, "save_file"),
            (shutil, "copy2"),
            (Path, "rmdir"),
        ]:
            patch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            now = self.count == self.at
            if now and not self.after:
                raise KeyboardInterrupt
            found = original(*args, **kwargs)
            if now:
                raise KeyboardInterrupt
            return found

        return call


def save(model: nn.Module, out: Path, note: str) -> None:
    with folder_in_place(out) as folder:
        sc.save(model, folder)
        (folder / "report.json").write_text(note)


def models() -> tuple[nn.Module, nn.Module]:
    dense = make()
    graph = sc.trace(dense, sc.Calibration.of([_inputs()]).first().args)
    scores = sc.score(graph, signals="l2")
    plans = [sc.Uniform(ratio=r, removal="l2").allocate(graph, scores) for r in (0.25, 0.5)]
    old, new = (sc.apply(dense, plan, graph=graph) for plan in plans)
    return old, new


def _inputs() -> Any:
    import torch

    return torch.zeros(4, 6)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_interrupted_at_any_write_it_is_the_old_artefact_or_the_new_one(
    tmp_path: Path, exists: bool, after: bool
) -> None:
    old, new = models()
    wanted: dict[str, Files] = {}
    for name, model in (("old", old), ("new", new)):
        save(model, tmp_path / name, name)
        wanted[name] = content(tmp_path / name)
    assert wanted["old"] != wanted["new"]
    place = tmp_path / "place"
    for at in range(1, 100):
        out = place / "small"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if exists:
            shutil.copytree(tmp_path / "old", out)
            (out / "notes.txt").write_text("the user's own")
        with pytest.MonkeyPatch.context() as patch:
            interrupting = Interrupting(patch, at, after)
            try:
                save(new, out, "new")
            except KeyboardInterrupt:
                assert interrupting.count >= at
            else:
                assert interrupting.count < at
                break
        found = content(place)
        if exists:
            assert found.pop("small/notes.txt") == b"the user's own"
        found = {name.removeprefix("small/"): data for name, data in found.items()}
        assert found in ((wanted["old"] if exists else {}), wanted["new"]), (at, list(found))
        if found:
            sc.load(out, make)
    assert at > (8 if exists else 5)  # or nothing was interrupted
    assert {n: d for n, d in content(out).items() if n != "notes.txt"} == wanted["new"]


def test_a_failure_while_replacing_puts_the_old_ones_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = models()
    save(old, tmp_path, "old")
    before = content(tmp_path)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "report.json" and "/old/" not in str(source):
            raise PermissionError(1, "no")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("no links here")))
    with pytest.raises(sc.ArtefactError, match="got no permission"):
        save(new, tmp_path, "new")
    assert content(tmp_path) == before


def test_ctrl_c_waits_for_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("old")
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace)
    before = signal.getsignal(signal.SIGINT)

    def write() -> None:
        with folder_in_place(tmp_path) as folder:
            (folder / "a").write_text("new")
            (folder / "b").write_text("new")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert content(tmp_path) == {"a": b"new", "b": b"new"}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_file_takes_its_place_or_not(tmp_path: Path) -> None:
    file = tmp_path / "curve.svg"
    file.write_text("old")

    def interrupted() -> None:
        with replacing(file) as partial:
            assert partial.suffix == ".svg"
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path) == {"curve.svg": b"old"}
    with replacing(file) as partial:
        partial.write_text("new")
    assert content(tmp_path) == {"curve.svg": b"new"}


def test_an_interrupted_command_says_so_and_ends_with_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sc, "save", interrupted)
    result = run(
        "prune", "--model", "net.py:make", "--data", "net.py:load", "--macs", "0.5", "--out", "small"
    )
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "secateur: interrupted; no file was left half-written."
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "net.py",
        "x.npz",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal(folder: Path, number: signal.Signals) -> None:
    (folder / "slow.py").write_text(
        "import sys, time\nimport net\n\ndef load():\n"
        "    for batch in net.load():\n"
        "        print('reading', file=sys.stderr, flush=True)\n"
        "        time.sleep(0.2)\n        yield batch\n"
    )
    (folder / "small").mkdir()
    (folder / "small" / "notes.txt").write_text("before")
    code = "from secateur.cli.entry import run; run()"
    arguments = (
        "prune",
        "--model",
        "net.py:make",
        "--data",
        "slow.py:load",
        "--macs",
        "0.5",
        "--out",
        "small",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        # Jobs that a shell runs in the background ignore the signal, and hand that down.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stderr is not None
    while "reading" not in (line := process.stderr.readline()):
        assert line, "the command ended before it read anything"
    time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said.splitlines()[-1] == "secateur: interrupted; no file was left half-written."
    assert "Traceback" not in said
    assert content(folder / "small") == {"notes.txt": b"before"}


@pytest.mark.parametrize("out", ["new", "new/inside/it", "old", "."])
def test_where_a_folder_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    with folder_in_place(Path(out)) as folder:
        (folder / "file").write_text("text")
    assert (tmp_path / out / "file").read_text() == "text"
    assert not [path for path in tmp_path.rglob(".*partial*")]
