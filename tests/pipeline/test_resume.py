"""A run that is killed goes on where it was, and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.common.training import Loop
from secateur.errors import ArtefactError
from secateur.repairs import sweep as sweeping
from secateur.repairs.judging import Judge
from secateur.signals import storage
from secateur.signals.journal import RUN, discard
from secateur.signals.onepass import OnePass
from tests.signals.processes import in_processes

OPTIONS: dict[str, Any] = {"measure_latency": False, "progress": False}


class Net(nn.Module):
    """A residual network with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.back = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.Conv2d(8, 6, 1)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.back(self.inner(x).relu())
        return self.last(x.mean((2, 3)))


class Step(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.back = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.inner(x).relu())


class Deep(Net):
    """The same network with three blocks of a list, which may be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return self.last(x.mean((2, 3)))


def network(case: str = "") -> nn.Module:
    torch.manual_seed(0)
    return (Deep if case == "blocks" else Net)().eval()


def batches(count: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 2, 5, 5, generator=generator), torch.arange(5) % 3) for _ in range(count)]


CASES: dict[str, dict[str, Any]] = {
    "auto": {"budget": sc.Budget(macs=0.6)},
    "one rule": {
        "budget": sc.Budget(macs=0.5),
        "allocator": "repair_aware",
        "repair": ["reconstruct", "bias"],
    },
    "search": {
        "budget": sc.Budget(macs=0.6),
        "allocator": sc.Search(evaluations=6),
        "repair": ["reconstruct", sc.Polish(passes=2)],
    },
    "polish": {
        "budget": sc.Budget(macs=0.5),
        "allocator": "uniform",
        "repair": sc.Polish(passes=6, learning_rate=0.3),  # too fast, so that it goes back on the way
    },
    "rounds": {"budget": sc.Budget(macs=0.6), "allocator": "uniform", "steps": 2, "repair": "reconstruct"},
    "weights": {
        "budget": sc.Budget(sparsity=0.5),
        "granularity": "weight",
        "repair": ["surgeon", "reconstruct"],
    },
    "blocks": {"budget": sc.Budget(params=0.9), "granularity": "block", "repair": "reconstruct"},
}


QUICK = ("one rule", "polish")


def pruned(case: str, checkpoint: Path | None, out: Path, data: list[Any] | None = None) -> sc.Result:
    given = batches(12 if case == "auto" else 8) if data is None else data
    result = sc.prune(network(case), given, **CASES[case], checkpoint=checkpoint, **OPTIONS)
    sc.save(result.model, out)
    return result


def content(folder: Path) -> dict[str, bytes]:
    """The files of an artefact, without the minutes that `Polish` took."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    record = json.loads(files["secateur.json"])
    if any("minutes" in each for each in record["repairs"]):
        del record["record_sha256"]
        record["repairs"] = [{**each, "minutes": 0} for each in record["repairs"]]
        files["secateur.json"] = json.dumps(record).encode()
    return files


class Killed(BaseException):
    """Stands for SIGKILL."""


def killed_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die in its n-th write of a step, before it takes effect."""
    left = [writes]
    real = storage.save_file

    def save_file(*args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(*args, **kwargs)

    monkeypatch.setattr(storage, "save_file", save_file)


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_chain_of_kills_changes_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pruned(case, None, tmp_path / "undisturbed")
    folder, kills = tmp_path / "run", 0
    while True:
        with monkeypatch.context() as patch:
            killed_after(1 + 5 * kills, patch)
            try:
                found = pruned(case, folder, tmp_path / "resumed")
            except Killed:
                kills += 1
            else:
                break
    assert kills >= 2
    assert content(tmp_path / "resumed") == content(tmp_path / "undisturbed")
    for signal_, by_group in expected.scores.values.items():
        for group, vector in by_group.items():
            assert vector.tobytes() == found.scores[signal_][group].tobytes()
    here, there = (r.report.model_dump(exclude={"seconds", "versions"}) for r in (expected, found))
    for each in (*here["repairs"], *there["repairs"]):
        each.pop("minutes", None)  # of the polish
    assert here == there


def test_finished_passes_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, real = [0], Loop._keep

    def keep(self: Loop, *args: Any) -> None:
        passes[0] += 1
        real(self, *args)
        if passes[0] == 4:
            raise Killed

    monkeypatch.setattr(Loop, "_keep", keep)
    with pytest.raises(Killed):
        pruned("polish", tmp_path / "run", tmp_path / "resumed")
    kept = [path for path in (tmp_path / "run").iterdir() if path.name.startswith("passes-")]
    assert len(kept) == 1
    pruned("polish", tmp_path / "run", tmp_path / "resumed")
    assert passes[0] == 5 * 6  # folds of the cross-validation, passes of each
    assert not any(path.name.startswith("passes-") for path in (tmp_path / "run").iterdir())


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"score": 0, "judge": 0, "fit": 0}

    def counted(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(OnePass, "run", "score")
    counted(Judge, "__call__", "judge")
    counted(sweeping, "fit", "fit")
    pruned("auto", tmp_path / "run", tmp_path / "a")
    first = dict(counts)
    assert min(first.values()) > 0
    pruned("auto", tmp_path / "run", tmp_path / "b")
    assert counts == first
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    pruned("rounds", tmp_path / "run", tmp_path / "small")
    other = batches()
    other[0][0][0, 0, 0, 0] += 1
    with pytest.raises(ArtefactError, match="values in the first batch"):
        pruned("rounds", tmp_path / "run", tmp_path / "small", other)
    with pytest.raises(ArtefactError, match="number of batches"):
        pruned("rounds", tmp_path / "run", tmp_path / "small", batches()[:-1])
    with pytest.raises(ArtefactError, match=r"expected one of this run, with (budget|allocator|repair)"):
        pruned("one rule", tmp_path / "run", tmp_path / "small")
    with pytest.raises(ArtefactError, match="with seed 1, got 0"):
        sc.prune(network(), batches(), **CASES["rounds"], checkpoint=tmp_path / "run", seed=1, **OPTIONS)
    changed = network()
    with torch.no_grad():
        changed.get_parameter("last.bias")[0] += 1
    with pytest.raises(ArtefactError, match="with weights"):
        sc.prune(changed, batches(), **CASES["rounds"], checkpoint=tmp_path / "run", **OPTIONS)


def test_a_folder_that_a_run_works_in_is_refused_and_stays(tmp_path: Path) -> None:
    """The second run is another process; the one that ends first does not take the steps of the other."""
    case, folder = CASES["rounds"], tmp_path / "run"
    sc.prune(network(), batches(), **case, checkpoint=folder, **OPTIONS)
    hold = "import sys; from pathlib import Path; from secateur.artefact.writing import locked_file\n"
    hold += "with locked_file(Path(sys.argv[1])) as mine: print(mine, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(folder / RUN)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        before = sorted(folder.iterdir())
        with pytest.raises(ArtefactError, match="got one that another run works in"):
            sc.prune(network(), batches(), **case, checkpoint=folder, **OPTIONS)
        discard(folder)
        assert sorted(folder.iterdir()) == before
        other.kill()
    sc.prune(network(), batches(), **case, checkpoint=folder, **OPTIONS)
    discard(folder)
    assert not folder.exists()


def test_damaged_files_say_what_to_delete(tmp_path: Path) -> None:
    case, folder = CASES["rounds"], tmp_path / "run"
    sc.prune(network(), batches(), **case, checkpoint=folder, **OPTIONS)
    scores = next(folder.glob("scores-*"))
    whole = scores.read_bytes()
    for damaged in (b"", whole[:50], whole[:-2] + b"\xff\xff"):
        scores.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=r"[\.)] Delete the file to compute it again\.$"):
            sc.prune(network(), batches(), **case, checkpoint=folder, **OPTIONS)
    scores.unlink()
    (folder / RUN).write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"Delete the folder to start afresh, or name another\.$"):
        sc.prune(network(), batches(), **case, checkpoint=folder, **OPTIONS)
    with pytest.raises(ArtefactError, match="expected a path, got int"):
        sc.prune(network(), batches(), **case, checkpoint=3, **OPTIONS)  # type: ignore[arg-type]


class Gated(Net):
    """The same tensors, but another function."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm(self.first(x)))
        x = x + self.back(self.inner(x).relu())
        return self.last(x.mean((2, 3)))


def test_a_checkpoint_from_before_an_edit_is_refused(tmp_path: Path) -> None:
    """Of code, and of values behind the first batch."""
    case, loaders = CASES["rounds"], []
    for change in (0, 1):
        inputs, labels = map(torch.cat, zip(*batches(), strict=True))
        inputs[-1] += change
        loaders.append(DataLoader(TensorDataset(inputs, labels), batch_size=5))
    sc.prune(network(), loaders[0], **case, checkpoint=tmp_path / "run", **OPTIONS)
    edited = Gated().eval()
    edited.load_state_dict(network().state_dict())
    edited.__class__.__name__ = "Net"
    with pytest.raises(ArtefactError, match="with code of the model or of functions"):
        sc.prune(edited, loaders[0], **case, checkpoint=tmp_path / "run", **OPTIONS)
    with pytest.raises(ArtefactError, match="with values of the data"):
        sc.prune(network(), loaders[1], **case, checkpoint=tmp_path / "run", **OPTIONS)


CHILD = """
import os, signal, sys
from pathlib import Path
from secateur.signals import storage
from tests.pipeline.test_resume import pruned
real, left = storage.write, [int(sys.argv[2])]
def write(*args, **kwargs):
    real(*args, **kwargs)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
for module in ("checkpoint", "journal"):
    setattr(__import__(f"secateur.signals.{module}", fromlist=["write"]), "write", write)
pruned("auto", Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "resumed")
"""


@pytest.mark.slow
def test_processes_that_are_killed(tmp_path: Path) -> None:
    pruned("auto", None, tmp_path / "undisturbed")
    codes = []
    for writes, how in ((2, "SIGKILL"), (9, "SIGTERM"), (30, "SIGKILL"), (60, "SIGINT"), (1000, "SIGKILL")):
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(writes), how]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        codes.append(done.returncode)
        if done.returncode == 0:
            break
    assert codes[-1] == 0, (codes, done.stderr)
    assert codes[0] == -signal.SIGKILL
    assert len(codes) > 2
    assert content(tmp_path / "resumed") == content(tmp_path / "undisturbed")
    assert os.listdir(tmp_path / "run")


def _shared(place: str, writes: int) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "0":
            killed_after(writes, patch)
        try:
            result = sc.prune(
                network(), batches(), **CASES["one rule"], checkpoint=Path(place) / "run", **OPTIONS
            )
        except (Killed, sc.SecateurError):
            return b""
    return b"".join(t.numpy().tobytes() for t in result.model.state_dict().values())


@pytest.mark.slow
def test_two_processes_go_on_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_TIMEOUT", "20")
    first = in_processes(_shared, 2, str(tmp_path), 6)
    assert first == [b"", b""]
    again = in_processes(_shared, 2, str(tmp_path), 1000)
    (tmp_path / "other").mkdir()
    fresh = in_processes(_shared, 2, str(tmp_path / "other"), 1000)
    assert again == fresh
    assert again[0] == again[1] != b""
