from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from secateur.allocators import ToD
from secateur.errors import ArtefactError, ScoreError
from secateur.graph.trace import trace
from secateur.signals import Scores, score, storage
from tests.helpers.models import build
from tests.signals.data import labelled


def test_scores_are_read_only_copies() -> None:
    given = np.array([1, 2])
    scores = Scores({"a": {"g": given}})
    given[0] = 9
    assert scores["a"]["g"].tolist() == [1.0, 2.0]
    assert scores["a"]["g"].dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        scores["a"]["g"][0] = 1.0
    with pytest.raises(TypeError):
        scores["a"]["g"] = given  # type: ignore[index]


def test_what_is_in_them() -> None:
    scores = Scores({"a": {"g": np.zeros(2)}, "b": {"g": np.ones(2)}}, samples=7, classes=2, seed=1)
    assert scores.signals == ("a", "b")
    assert "a" in scores
    assert "c" not in scores
    assert repr(scores) == "Scores(a, b: 1 groups, 7 samples, seed 1)"
    with pytest.raises(ScoreError, match="expected one of a, b, got 'c'"):
        scores["c"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"a": {"g": np.array([0.0, np.nan])}},
            "signal a, group g: expected finite scores, got nan for unit 1",
        ),
        ({"a": {"g": np.array([np.inf])}}, "got inf for unit 0"),
        ({"a": {"g": np.zeros((2, 2))}}, r"expected one score per unit, got shape \[2, 2\]"),
        ({"a": {"g": np.zeros(2)}, "b": {"h": np.zeros(2)}}, r"signal b: .* difference in \['g', 'h'\]"),
    ],
)
def test_malformed_scores(values: dict[str, dict[str, np.ndarray]], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        Scores(values)


def test_scores_belong_to_a_graph() -> None:
    graph = trace(build("mlp"), torch.zeros(2, 6, dtype=torch.float64))
    values = {group.name: np.zeros(group.size) for group in graph.groups}
    Scores({"a": values}, fingerprint=graph.fingerprint).check(graph)
    with pytest.raises(ScoreError, match="signal a, group 0: expected 12 scores, got 3"):
        Scores({"a": values | {"0": np.zeros(3)}}).check(graph)
    with pytest.raises(ScoreError, match="group other: expected no scores, got 3"):
        Scores({"a": values | {"other": np.zeros(3)}}).check(graph)
    with pytest.raises(ScoreError, match=r"expected scores of model .*, got 0000"):
        Scores({"a": values}, fingerprint="0" * 64).check(graph)


def table() -> Scores:
    values = {
        "a": {"stem/conv.1": np.array([0.1, -0.0, 1e-300]), "g": np.array([np.pi])},
        "b+c": {"stem/conv.1": np.array([3.0, 2.0, 1.0]), "g": np.array([7.0])},
    }
    return Scores(values, samples=7, classes=2, seed=-1, fingerprint="f" * 64)


def test_a_table_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    saved = table()
    path = saved.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(str(path))
    assert loaded.signals == saved.signals
    for signal in saved.signals:
        assert list(loaded[signal]) == list(saved[signal])
        for group, vector in saved[signal].items():
            assert loaded[signal][group].tobytes() == vector.tobytes()
    for name in ("samples", "classes", "seed", "fingerprint"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.safetensors"]
    assert not loaded["a"]["g"].flags.writeable


def test_a_table_replaces_another_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table().save(tmp_path / "scores")
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Scores({"a": {"g": np.zeros(2)}}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    Scores({"a": {"g": np.zeros(2)}}).save(path)
    assert Scores.load(path).signals == ("a",)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_every_damage_is_refused(tmp_path: Path) -> None:
    path = table().save(tmp_path / "scores")
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match="scores: expected"):
            Scores.load(path)
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtefactError, match="scores: expected a safetensors file, got a damaged one"):
            Scores.load(path)


def test_what_is_no_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with pytest.raises(ArtefactError, match="file: expected scores, got no file that can be read"):
        Scores.load(path)
    with pytest.raises(ArtefactError, match="expected scores, got no file"):
        Scores.load(tmp_path)
    with pytest.raises(ArtefactError, match=r"scores: expected a folder .*missing, got none"):
        table().save(tmp_path / "missing" / "scores")
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ArtefactError, match="expected scores of secateur, got a file of another origin"):
        Scores.load(path)
    storage.write(path, "something", storage.Header(), {"w": torch.zeros(2)})
    with pytest.raises(ArtefactError, match="expected scores of secateur, got something"):
        Scores.load(path)
    monkeypatch.setattr(storage, "FORMAT", storage.FORMAT + 1)
    table().save(path)
    monkeypatch.undo()
    with pytest.raises(ArtefactError, match=r"expected format 1 or older, got 2, .* Upgrade"):
        Scores.load(path)


def test_plans_come_from_a_saved_table_without_the_data(tmp_path: Path) -> None:
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    scores = score(graph, data)
    loaded = Scores.load(scores.save(tmp_path / "scores"))
    loaded.check(graph)
    assert ToD().allocate(graph, loaded).to_json() == ToD().allocate(graph, scores).to_json()
