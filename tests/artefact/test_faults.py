"""Whatever dies or fails while it writes, and however often: what is there is the old content or the new."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.artefact import content as reading
from secateur.artefact import writing
from secateur.artefact.pair import folder_in_place, hidden_name
from secateur.artefact.writing import PREFIX, replace_text, replacing, replacing_folder
from secateur.signals.checkpoint import Checkpoint, Position, Saved
from secateur.signals.journal import Journal, Step
from tests.artefact.faults import Killed, content, faults, litter, visible
from tests.report.reports import report

VERSIONS = range(4)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def _models() -> tuple[list[sc.Plan], list[nn.Module]]:
    graph = sc.trace(make(), torch.zeros(2, 4))
    scores = sc.score(graph, None, "magnitude")
    plans = [sc.Uniform(ratio=r).allocate(graph, scores) for r in (0.25, 0.5, 0.625, 0.75)]
    return plans, [sc.apply(make(), plan, graph=graph) for plan in plans]


PLANS, MODELS = _models()


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _write_folder(place: Path, k: int) -> None:
    with replacing_folder(place / "model") as folder:
        (folder / "config.json").write_text(str(k))
        (folder / "weights").write_text(str(k))


def _read_folder(place: Path) -> int:
    one, other = (int((place / "model" / name).read_text()) for name in ("config.json", "weights"))
    assert one == other
    return one


def _write_run(place: Path, k: int) -> None:
    with folder_in_place(place / "run") as folder:
        sc.save(MODELS[k], folder)
        (folder / "report.json").write_text(str(k))


def _read_model(folder: Path) -> int:
    record = sc.record_of(sc.load(folder, make))
    return PLANS.index(record.plan)


def _write_checkpoint(place: Path, k: int) -> None:
    values = {"taylor": {"0": np.full(3, float(k))}}
    Checkpoint(place / "run", 0, {}).save(Saved(Position(number=k), {}, values))


def _read_checkpoint(place: Path) -> int:
    found = Checkpoint(place / "run", 0, {}).load()
    assert found is not None
    return found.position.number


def _step(place: Path) -> Step:
    return Journal(place).step("refit", "one")


def _read_step(place: Path) -> int:
    found = _step(place).load(lambda notes, _: int(notes))
    assert found is not None
    return found


def _write_data(place: Path, k: int) -> None:
    with replacing(place / "net.onnx") as partial:
        name = f"net.onnx.{k:016x}.data"
        (partial.parent / name).write_text(str(k))
        partial.write_text(name)


def _read_data(place: Path) -> int:
    return int((place / (place / "net.onnx").read_text()).read_text())


@dataclass(frozen=True)
class Writer:
    """How the k-th version of something is written, and which version is there."""

    write: Callable[[Path, int], Any]
    read: Callable[[Path], int]


WRITERS = {
    "artefact": Writer(lambda p, k: sc.save(MODELS[k], p / "a"), lambda p: _read_model(p / "a")),
    "run": Writer(_write_run, lambda p: _read_model(p / "run")),
    "plan": Writer(
        lambda p, k: PLANS[k].to_json(p / "plan.json"),
        lambda p: PLANS.index(sc.Plan.from_json(p / "plan.json")),
    ),
    "scores": Writer(
        lambda p, k: sc.Scores({"a": {"g": np.zeros(2)}}, samples=k).save(p / "s"),
        lambda p: sc.Scores.load(p / "s").samples,
    ),
    "masks": Writer(
        lambda p, k: sc.MaskPlan("", "hand", {"w": np.ones((2, 3), bool)}, seed=k).save(p / "m"),
        lambda p: sc.MaskPlan.load(p / "m").seed,
    ),
    "finished step": Writer(lambda p, k: _step(p).save(k), _read_step),
    "checkpoint": Writer(_write_checkpoint, _read_checkpoint),
    "report": Writer(
        lambda p, k: report(note=f"{k}").to_json(p / "report.json"),
        lambda p: int(sc.Report.from_json(p / "report.json").note),
    ),
    "folder": Writer(_write_folder, _read_folder),
    "file with data": Writer(_write_data, _read_data),
}


@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_any_call_up_to_five_times(name: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    generator = np.random.default_rng(0)
    writer.write(tmp_path, 0)
    assert writer.read(tmp_path) == 0
    at, there = 1, 0
    while True:
        first = (there + 1) % 4
        with faults(at, kill=True) as fault:
            try:
                writer.write(tmp_path, first)
            except Killed:
                pass
            else:
                break
        assert fault.happened
        found = writer.read(tmp_path)
        assert found in (there, first), at
        for _ in range(
            int(generator.integers(0, 5))
        ):  # the next ones die too, before what the first one left
            there, following = found, (found + 1) % 4
            with faults(int(generator.integers(1, at + 2)), kill=True):
                try:
                    writer.write(tmp_path, following)
                except Killed:
                    pass
            found = writer.read(tmp_path)
            assert found in (there, following), at
        there = (found + 1) % 4
        writer.write(tmp_path, there)
        assert writer.read(tmp_path) == there
        assert not litter(tmp_path), at
        at += 1
    assert at > 5  # or nothing was killed


@pytest.mark.parametrize("name", WRITERS)
def test_a_failing_call_leaves_the_old_one(name: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    writer.write(tmp_path, 0)
    before, at = visible(tmp_path), 0
    while True:
        at += 1
        said = ""
        with faults(at, kill=False) as fault:
            try:
                writer.write(tmp_path, 1)
            except sc.SecateurError as error:
                said = str(error)
        if not fault.happened:
            break
        found = writer.read(tmp_path)
        assert found in (0, 1)
        assert not said or ("bytes are free there" in said and len(said) <= 600)
        if said and visible(tmp_path) != before:
            assert found == 1, at  # it failed behind the rename that decides, where nothing can be undone
        writer.write(tmp_path, 0)
        assert writer.read(tmp_path) == 0
        assert not litter(tmp_path), at
        before = visible(tmp_path)  # the order in a safetensors header may differ
    assert at > 5


def test_without_exchange_the_next_write_puts_the_old_folder_back(tmp_path: Path) -> None:
    _write_folder(tmp_path, 0)
    at, missing = 1, 0
    while True:
        with faults(at, kill=True, exchange=False) as fault:
            try:
                _write_folder(tmp_path, 1)
            except Killed:
                pass
        if not fault.happened:
            break
        if not (tmp_path / "model").exists():
            missing += 1
            replace_text(tmp_path / "other", "")
        assert _read_folder(tmp_path) in (0, 1)
        _write_folder(tmp_path, 0)
        assert not litter(tmp_path)
        at += 1
    assert missing == 1  # between the two renames, and nowhere else


def test_two_saves_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    """With real processes and real signals."""
    code = """
import os, pathlib, shutil, signal, sys
from secateur.artefact.pair import folder_in_place
real, left = os.replace, int(sys.argv[3])
def replace(a, b):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(a, b)
os.replace = replace
with folder_in_place(pathlib.Path(sys.argv[1])) as folder:
    shutil.copytree(sys.argv[2], folder, dirs_exist_ok=True)
"""
    for version in range(3):
        sc.save(MODELS[version], tmp_path / str(version))
    place = tmp_path / "place"
    sc.save(MODELS[0], place)
    for version, renames in ((1, 2), (2, 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, place, tmp_path / str(version), str(renames)], capture_output=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert _read_model(place) == 1
        assert litter(place)
    sc.save(MODELS[3], place)
    assert _read_model(place) == 3
    assert sorted(p.name for p in place.iterdir()) == ["model.safetensors", "secateur.json"]


def test_a_reader_meets_a_save_that_comes_back_to_the_record_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the first record and the tensors of a second save; then the first model is saved again."""
    for version in (0, 1):
        sc.save(MODELS[version], tmp_path / str(version))
    place = tmp_path / "place"
    shutil.copytree(tmp_path / "0", place)
    opening, replaced = reading._opened_if_there, reading._replaced
    hidden = hidden_name(json.loads((place / "secateur.json").read_text())["tensors_sha256"])
    saves = iter(("the second", "the first, half"))

    def open_after_the_second(path: Path, folder: Path) -> Any:
        if path.name == "model.safetensors" and next(saves, "") == "the second":
            shutil.copytree(tmp_path / "1", place, dirs_exist_ok=True)
        return opening(path, folder)

    def look_while_the_first_is_saved_again(*arguments: Any) -> bool:
        if next(saves, ""):
            shutil.copy(tmp_path / "0" / "model.safetensors", place / hidden)
            shutil.copy(tmp_path / "0" / "secateur.json", place)
        return replaced(*arguments)

    monkeypatch.setattr(reading, "_opened_if_there", open_after_the_second)
    monkeypatch.setattr(reading, "_replaced", look_while_the_first_is_saved_again)
    assert _read_model(place) == 0
    assert next(saves, None) is None


def test_a_reader_meets_a_file_that_a_save_moves_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the first record, and the tensors of a second save are there; the first ones are looked for."""
    place = tmp_path / "place"
    for version in (0, 1):
        sc.save(MODELS[version], tmp_path / str(version))
    shutil.copytree(tmp_path / "0", place)
    shutil.copy(tmp_path / "1" / "model.safetensors", place)
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: sc.save(MODELS[1], place))
    monkeypatch.setattr(reading, "_replaced", lambda *_: True)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    assert _read_model(place) == 1


def test_what_is_not_ours_is_never_deleted(tmp_path: Path) -> None:
    name = PREFIX + "0" * 32
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("precious")
    (tmp_path / (PREFIX + "1" * 32)).write_text("a file")
    (tmp_path / (PREFIX + "2" * 32)).symlink_to(tmp_path / name, target_is_directory=True)
    other = tmp_path / (PREFIX + "3" * 32)
    other.mkdir()
    (other / writing.OWNER).write_text("somebody else's")
    (other / "mine.txt").write_text("precious")
    fifo = tmp_path / (PREFIX + "4" * 32)
    fifo.mkdir()
    os.mkfifo(fifo / writing.OWNER)
    before = content(tmp_path)
    replace_text(tmp_path / "new", "text")
    assert content(tmp_path) == before | {"new": b"text"}
    assert fifo.exists()


def test_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as one:
        one.write_text("one")
        with replacing(tmp_path / "b") as other:
            other.write_text("other")
        assert one.exists()
    assert content(tmp_path) == {"a": b"one", "b": b"other"}


@pytest.mark.parametrize("name", WRITERS)
def test_links_are_replaced_and_not_followed(name: str, tmp_path: Path) -> None:
    place, victims = tmp_path / "place", tmp_path / "victims"
    place.mkdir()
    victims.mkdir()
    WRITERS[name].write(place, 0)
    for number, path in enumerate(sorted(p for p in place.rglob("*") if p.is_file())):
        victim = victims / str(number)
        victim.write_text("precious")
        path.unlink()
        path.symlink_to(victim)
    WRITERS[name].write(place, 1)
    assert set(content(victims).values()) == {b"precious"}
    assert WRITERS[name].read(place) == 1


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("odd", ["\0", "x" * 300, "file/below"])
def test_places_that_cannot_be_written_to(name: str, odd: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(sc.SecateurError, match="expected") as caught:
        WRITERS[name].write(tmp_path / odd, 0)
    assert len(str(caught.value)) <= 600
    assert content(tmp_path) == {"file": b"old"}


def test_a_folder_where_a_file_should_be_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(sc.PlanError, match="got a folder where the file should be"):
        PLANS[0].to_json(tmp_path / "plan.json")
    (tmp_path / "a").write_text("old")
    with pytest.raises(sc.ArtefactError, match="got a file where a folder should be"):
        sc.save(MODELS[0], tmp_path / "a")
    (tmp_path / "b" / "secateur.json").mkdir(parents=True)
    with pytest.raises(sc.ArtefactError, match=r"got a folder where the file secateur\.json should be"):
        sc.save(MODELS[0], tmp_path / "b")
    assert content(tmp_path) == {"a": b"old"}
    assert not litter(tmp_path)
