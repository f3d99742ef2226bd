"""Files that a reader once did not survive, as ``make fuzz`` found them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from secateur.errors import LONGEST
from tests.artefact.test_hostile import outcome
from tests.helpers.hostile import READERS

CORPUS = Path(__file__).parents[1] / "corpus"
FINDS = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("find", FINDS, ids=lambda find: f"{find.parent.name}-{find.name}")
def test_past_finds(find: Path, tmp_path: Path) -> None:
    reader = READERS[find.parent.name]
    reader.write(tmp_path)
    shutil.copyfile(find, tmp_path / reader.file)
    said = outcome(reader, tmp_path)
    assert said is None or len(said) <= LONGEST


def test_there_are_finds() -> None:
    assert FINDS
