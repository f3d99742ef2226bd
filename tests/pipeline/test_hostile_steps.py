"""Steps of a run that somebody changed, with right checksums: refused by name, or taken for what they say."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.errors import LONGEST, ArtefactError
from secateur.signals import storage
from secateur.signals.journal import RUN, Step, discard
from tests.helpers.hostile import ODD, changed, content_of, places

EACH = 12
"""Changes of each kind of step, and of the notes of each file among which they are drawn."""


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


NET = _net()
DATA = [(torch.randn(16, 4), torch.arange(16) % 3) for _ in range(8)]


def _run(folder: Path) -> Any:
    return sc.prune(
        NET,
        DATA,
        sc.Budget(macs=0.6),
        repair=["reconstruct", sc.Polish(passes=3)],
        checkpoint=folder,
        measure_latency=False,
        progress=False,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind of step, a folder with such steps: of a run that ended, and of one that was killed."""
    found: dict[str, Path] = {}
    real = Step.save
    for name, most in (("ended", None), ("in training", "passes")):
        folder = tmp_path_factory.mktemp("steps") / name

        def save(self: Step, *args: Any, most: str | None = most) -> None:
            real(self, *args)
            if most is not None and self.name.startswith(most):
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Step, "save", save)
            if most is None:
                _run(folder)
            else:
                with pytest.raises(KeyboardInterrupt):
                    _run(folder)
        for file in folder.iterdir():
            if file.name != RUN:
                found.setdefault(file.name.partition("-")[0], folder)
    return found


def _changes(file: Path, number: int) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Contents and tensors that differ from those of a file in one thing."""
    draw = random.Random(number)
    content, tensors = content_of(file), load_file(file)
    notes = json.loads(content["header"]["notes"])
    of_notes = [(path, value) for path in places(notes) for value in (*ODD, math.nan, -math.inf)]
    for path, value in draw.sample(of_notes, min(EACH, len(of_notes))):
        header = content["header"] | {"notes": json.dumps(changed(notes, path, value))}
        yield content | {"header": header}, tensors
    for name in draw.sample(sorted(tensors), min(2, len(tensors))):
        whole = tensors[name]
        for other in (whole.reshape(-1)[:1].clone(), whole.to(torch.complex64), whole.to(torch.uint8)):
            yield content, tensors | {name: other}
        yield content, {"\x1b[2J" if key == name else key: value for key, value in tensors.items()}


@pytest.mark.parametrize("kind", ["scores", "candidate", "judged", "repair", "changed", "passes"])
def test_changed_steps(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    outcomes = set()
    sources = sorted(folders[kind].glob(f"{kind}-*"))
    cases = [(file, *change) for file in sources for change in _changes(file, 0)]
    for number, (source, content, tensors) in enumerate(random.Random(1).sample(cases, EACH)):
        folder = tmp_path / str(number)
        shutil.copytree(folders[kind], folder)
        text = json.dumps(content)
        seal = {"secateur": text, "sha256": storage._digest(text, tensors)}
        save_file(tensors, folder / source.name, metadata=seal)
        try:
            result = _run(folder)
        except sc.SecateurError as error:
            outcomes.add("refused" if len(str(error)) <= LONGEST else str(error))
        else:
            assert str(result.report)
            assert result.report.to_json()
            outcomes.add("taken")
    assert {"refused"} <= outcomes <= {"refused", "taken"}


def _result(folder: Path | None) -> tuple[str, dict[str, torch.Tensor]]:
    result = _run(folder)
    return result.plan.to_json(), result.model.state_dict()


def _same(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(torch.equal(one[1][name], value) for name, value in other[1].items())


def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """At whichever step: an error, and the next run gives what an undisturbed one gives."""
    usual = _result(tmp_path / "usual")
    real, names = storage.write, [p.name for p in sorted((tmp_path / "usual").iterdir())]
    for at in range(1, len(names) + 20, 7):
        count, folder = 0, tmp_path / str(at)

        def full(path: Path, *args: Any, at: int = at) -> None:
            nonlocal count
            count += 1
            if count == at:
                raise ArtefactError(f"{path}: expected a place that can be written to, got a full disk.")
            real(path, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.signals.journal.write", full)
            with pytest.raises(ArtefactError, match="full disk"):
                _run(folder)
        assert _same(_result(folder), usual), at


def test_killed_while_a_run_that_is_over_is_deleted(tmp_path: Path) -> None:
    """The command line deletes the steps once the model is written. What is left goes on to the same bits."""
    usual = _result(tmp_path / "usual")
    real, count = Path.unlink, sum(1 for _ in (tmp_path / "usual").iterdir())
    for at in range(1, count, 2):
        folder, left = tmp_path / str(at), at
        shutil.copytree(tmp_path / "usual", folder)  # with the times of the files

        def killed(self: Path, missing_ok: bool = False) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            real(self, missing_ok)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                discard(folder)
        assert _same(_result(folder), usual), at
