from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.errors import ArtefactError, ScoreError, SettingError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.signals import Scores, Taylor, Wasserstein, score, storage
from secateur.signals.checkpoint import _Run
from secateur.signals.program import CapturedModel
from secateur.signals.registry import SIGNALS
from tests.helpers.models import build
from tests.signals.data import labelled
from tests.signals.test_gather import MeanActivation

SIZES = (7, 3, 9, 4)
BY_DATA = [Wasserstein(projections=3, per_class=5), *(n for n in SIGNALS if n != "wasserstein")]


class Killed(Exception):
    """Stands for whatever ends a process."""


class Killing:
    """Batches, until one that is not given any more."""

    def __init__(self, data: list[Any], stop: int | None) -> None:
        self.data, self.stop = data, stop

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.data):
            if index == self.stop:
                raise Killed
            yield batch

    def __len__(self) -> int:
        return len(self.data)


def plain() -> tuple[Graph, list[tuple[Tensor, Tensor]]]:
    data = labelled("plain", SIZES)
    return trace(build("plain"), data[0][0]), data


def assert_identical(one: Scores, other: Scores) -> None:
    assert one.signals == other.signals
    for name in one.signals:
        assert list(one[name]) == list(other[name])
        for group, vector in one[name].items():
            assert vector.tobytes() == other[name][group].tobytes(), (name, group)
    for what in ("samples", "classes", "seed", "fingerprint"):
        assert getattr(one, what) == getattr(other, what)


def test_the_comparison_sees_the_last_bit() -> None:
    one, other = (Scores({"a": {"g": np.array([1.0, x])}}) for x in (0.1 + 0.2, 0.3))
    with pytest.raises(AssertionError):
        assert_identical(one, other)


def test_killed_at_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data = plain()
    whole = score(graph, data, BY_DATA)
    path = tmp_path / "run"
    runs: list[int] = []
    call = CapturedModel.__call__
    monkeypatch.setattr(CapturedModel, "__call__", lambda *a, **k: runs.append(1) or call(*a, **k))
    for stop in range(len(data)):
        runs.clear()
        with pytest.raises(Killed):
            score(graph, Killing(data, stop), BY_DATA, checkpoint=path, checkpoint_every=0)
        assert len(runs) == stop
        assert path.exists() == (stop > 0)
        resumed = score(graph, Killing(data, None), BY_DATA, checkpoint=path)
        assert_identical(resumed, whole)
        assert len(runs) == len(data)  # what was scored before was not scored again
        assert list(tmp_path.iterdir()) == []


def test_killed_again_and_again_in_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data = plain()
    signals = (Wasserstein(projections=3, per_class=5), "taylor", "fisher")
    whole, path = score(graph, data, signals), tmp_path / "run"
    call, calls, ran = CapturedModel.__call__, 0, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, ran
        calls += 1
        if calls % 3 == 0:
            raise Killed
        ran += 1
        return call(*args, **kwargs)

    monkeypatch.setattr(CapturedModel, "__call__", dying)
    deaths = 0
    while deaths < 20:
        try:
            scores = score(graph, data, signals, memory=3_000, checkpoint=path, checkpoint_every=0)
            break
        except Killed:
            deaths += 1
    assert ran == 3 * len(data)  # three passes, no batch twice
    assert deaths == 5
    assert_identical(scores, whole)


def test_killed_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data = plain()
    path, replace, writes = tmp_path / "run", os.replace, 0

    def dying(*args: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == 3:
            raise Killed
        replace(*args)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        score(graph, data, checkpoint=path, checkpoint_every=0)
    assert storage.read(path, "scoring checkpoint", _Run)[0].position.read == 2
    assert_identical(score(graph, data, checkpoint=path), score(graph, data))


_PROGRAM = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from secateur.graph.trace import trace
from secateur.signals import score
from tests.helpers.models import build
from tests.signals.data import labelled

class Loader(list):
    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

data = Loader(labelled("mlp"))
score(trace(build("mlp"), data[0][0]), data, checkpoint=sys.argv[1], checkpoint_every=0)
"""


def test_killed_for_good(tmp_path: Path) -> None:
    path = tmp_path / "run"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(path)],
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert storage.read(path, "scoring checkpoint", _Run)[0].position.read == 2
    data = labelled("mlp")
    graph = trace(build("mlp"), data[0][0])
    assert_identical(score(graph, data, checkpoint=path), score(graph, data))
    assert not path.exists()


def interrupted(path: Path) -> tuple[Graph, list[tuple[Tensor, Tensor]]]:
    graph, data = plain()
    with pytest.raises(Killed):
        score(graph, Killing(data, 2), ("taylor",), checkpoint=path, checkpoint_every=0)
    return graph, data


def test_a_file_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    graph, data = interrupted(path)
    before = path.read_bytes()
    other = build("plain")
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1e-12
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"run: expected one of this run, with seed 1, got 0\. Name another file", {"seed": 1}),
        (
            r"with signals Wasserstein\(per_class=32, .*\); Taylor\(\), got Taylor\(\)",
            {"signals": ("wasserstein", "taylor")},
        ),
        ("with model [0-9a-f]{64}, got [0-9a-f]{64}", {"graph": trace(build("mlp"), labelled("mlp")[0][0])}),
        ("with weights [0-9a-f]{64}, got [0-9a-f]{64}", {"graph": trace(other, data[0][0])}),
        ("with number of batches 3, got 4", {"calibration": data[:3]}),
        ("with memory 1000, got no limit", {"memory": 1000}),
        ("with loss_fn .*lambda.*, got default", {"loss_fn": lambda run, batch: run(batch[0]).mean()}),
    ]
    for message, changed in cases:
        given = {"graph": graph, "calibration": data, "signals": "taylor", "checkpoint": path} | changed
        with pytest.raises(ArtefactError, match=message):
            score(**given)
        assert path.read_bytes() == before


def test_other_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    graph, data = interrupted(path)
    changed = [(x.clone(), y) for x, y in data]
    changed[1][0][0, 0, 0, 0] += 1e-9
    for others in (changed, [data[1], data[0], *data[2:]]):
        with pytest.raises(ArtefactError, match="run: expected the 2 batches that were read before, got"):
            score(graph, others, "taylor", checkpoint=path)
    changed = [*data[:2], (data[2][0] + 1, data[2][1]), data[3]]  # what was not read yet may be anything
    score(graph, changed, "taylor", checkpoint=path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    graph, data = interrupted(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="run: expected a safetensors file, got a damaged one"):
        score(graph, data, "taylor", checkpoint=path)
    score(graph, data, "taylor").save(path)
    with pytest.raises(ArtefactError, match="run: expected scoring checkpoint of secateur, got scores"):
        score(graph, data, "taylor", checkpoint=path)
    with pytest.raises(SettingError, match=r"checkpoint: expected a folder .*nowhere, got none"):
        score(graph, data, "taylor", checkpoint=tmp_path / "nowhere" / "run")
    with pytest.raises(SettingError, match="checkpoint_every: expected seconds from 0, got -1"):
        score(graph, data, "taylor", checkpoint=path, checkpoint_every=-1)


def test_a_signal_that_cannot_say_what_it_holds_is_refused(tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    graph = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    with pytest.raises(ScoreError, match="signal mean: expected a tally with state and merge"):
        score(graph, [x], MeanActivation(), checkpoint=tmp_path / "run")
    score(graph, None, "magnitude", checkpoint=tmp_path / "run")  # reads no data, so there is nothing to keep


def test_what_is_random_resumes_too(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x + torch.randn_like(x)).relu())

    data = labelled("mlp", SIZES)
    graph = trace(Noisy().double(), data[0][0])
    loader = [(x[i], y[i]) for x, y in data for i in range(len(x))]
    shuffled = torch.utils.data.DataLoader(loader, batch_size=4, shuffle=True)
    whole = score(graph, shuffled)
    calls, batches = 0, len(shuffled)

    class Dying(Taylor):
        def start(self, context: Any) -> Any:
            tally = super().start(context)
            plain = tally.begin

            def begin(step: Any) -> None:
                nonlocal calls
                calls += 1
                if calls == 4:
                    raise Killed
                plain(step)

            tally.begin = begin
            return tally

    signals = (Wasserstein(), Dying())
    with pytest.raises(Killed):
        score(graph, shuffled, signals, checkpoint=tmp_path / "run", checkpoint_every=0)
    torch.randn(3)
    assert_identical(score(graph, shuffled, signals, checkpoint=tmp_path / "run"), whole)
    assert calls == batches + 1


def test_the_time_between_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data = plain()
    now, writes, write = 0.0, [], storage.write

    def clock() -> float:
        nonlocal now
        now += 1.0  # asked once when the run begins, and once or twice a batch
        return now

    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setattr(
        sys.modules["secateur.signals.checkpoint"],
        "write",
        lambda path, kind, header, tensors: (
            writes.append(header.position.read),
            write(path, kind, header, tensors),
        ),
    )
    score(graph, data, "taylor", checkpoint=tmp_path / "run", checkpoint_every=2)
    assert writes == [2, 4]
    writes.clear()
    score(graph, data, "taylor", checkpoint=tmp_path / "run", checkpoint_every=1e9)
    assert writes == [4]  # before what follows the last batch, which can take long
