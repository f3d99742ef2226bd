"""The folder in which a run keeps its finished steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.calibration import Calibration
from secateur.errors import ArtefactError
from secateur.signals.identity import of_data
from secateur.signals.journal import RUN, Journal, current_journal, discard, journal_in, plan_digest


def about(**other: str) -> dict[str, str]:
    return {"model": "Net", "seed": "0", **other}


def both(notes: Any, tensors: dict[str, torch.Tensor]) -> Any:
    return notes, tensors


def test_a_step_is_found_again_by_what_it_depends_on(tmp_path: Path) -> None:
    for _ in range(2):
        with journal_in(tmp_path / "run", about):
            journal: Any = current_journal()
            step = journal.step("refit", "a", "b")
            if step.load(both) is None:
                step.save([1.5, float("nan"), None], {"w": torch.tensor([1.0, -0.0], dtype=torch.bfloat16)})
            notes, tensors = step.load(both)
            assert (notes[0], notes[2]) == (1.5, None)
            assert notes[1] != notes[1]
            assert tensors["w"].dtype == torch.bfloat16
            assert bool(tensors["w"][1].signbit())
            for other in (("refit", "ab", ""), ("refit", "a"), ("judged", "a", "b")):
                assert journal.step(*other).load(both) is None
        assert current_journal() is None


def test_steps_inside_another_go_when_it_is_saved(tmp_path: Path) -> None:
    with journal_in(tmp_path, about):
        journal: Any = current_journal()
        outer, beside = journal.step("repair", "x"), journal.step("refit", "beside")
        beside.save(1)
        with outer.inside():
            journal.step("refit", "inner").save(2)
        outer.save(3)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {RUN, outer.name, beside.name}


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    with journal_in(tmp_path / "run", about):
        pass
    with pytest.raises(ArtefactError, match="expected one of this run, with seed 1, got 0") as refused:
        with journal_in(tmp_path / "run", lambda: about(seed="1")):
            pass
    assert "delete this one" in str(refused.value)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"got 'notes.txt' in it"):
        with journal_in(tmp_path, about):
            pass
    with pytest.raises(ArtefactError, match=r"a file where a folder should be|something else that is there"):
        with journal_in(tmp_path / "notes.txt", about):
            pass


def test_a_step_of_another_name_or_damaged_is_refused(tmp_path: Path) -> None:
    with journal_in(tmp_path, about):
        journal: Any = current_journal()
        one, other = journal.step("refit", "one"), journal.step("refit", "other")
        one.save(1)
        one.path.rename(other.path)
        with pytest.raises(ArtefactError, match="expected step refit-"):
            other.load(both)
        whole = other.path.read_bytes()
        for damaged in (b"", whole[:-3], whole[:40], whole.replace(b"finished step", b"finished stop")):
            other.path.write_bytes(damaged)
            with pytest.raises(ArtefactError):
                other.load(both)


def test_only_what_the_run_wrote_is_deleted(tmp_path: Path) -> None:
    with journal_in(tmp_path / "run", about):
        journal: Any = current_journal()
        journal.step("refit", "one").save(1)
        (tmp_path / "run" / f"scoring-{'0' * 40}.1of2").touch()
    (tmp_path / "run" / "mine.txt").touch()
    discard(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
    discard(tmp_path / "run")  # no run any more: nothing is touched
    assert (tmp_path / "run" / "mine.txt").exists()
    with journal_in(tmp_path / "other", about):
        pass
    discard(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_data_are_known_by_their_values_and_by_how_they_were_cut() -> None:
    batches = [torch.arange(6.0).reshape(3, 2) + k for k in range(6)]
    data = Calibration.of(batches)
    fit, held = data.split(3)
    texts = [of_data(each) for each in (data, fit, held, data.recut(1), Calibration.of(batches, seed=1))]
    assert len({*texts}) == len(texts)
    assert of_data(Calibration.of([b.clone() for b in batches]).split(3)[0]) == of_data(fit)
    assert of_data(Calibration.of([*batches[:-1], batches[-1] + 1])) != of_data(data)
    loader = DataLoader(TensorDataset(torch.arange(12.0)), 4)
    other = DataLoader(TensorDataset(torch.arange(12.0) + 1), 4)
    assert (
        of_data(Calibration.of(loader)) == of_data(Calibration.of(loader)) != of_data(Calibration.of(other))
    )


def test_masks_with_equal_counts_are_different_plans() -> None:
    one, other = np.array([[True, False]]), np.array([[False, True]])
    plans = [sc.MaskPlan("", "hand", {"w": mask}) for mask in (one, other)]
    assert plans[0].to_json() == plans[1].to_json()
    assert plan_digest(plans[0]) != plan_digest(plans[1])


def test_no_folder_keeps_nothing() -> None:
    with journal_in(None, about):
        assert current_journal() is None
    assert Journal(Path("nowhere")).open == []
