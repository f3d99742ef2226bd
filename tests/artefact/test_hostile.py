"""A hostile file is read as what it says, or refused in words; nothing hangs, and nothing else is raised."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from secateur import plan
from secateur.artefact import pair
from secateur.cli.loading import arrays
from secateur.common import reading, tensorfile
from secateur.config import read, yaml
from secateur.errors import LONGEST, SecateurError
from secateur.graph import inputs
from secateur.report import report
from tests.helpers.hostile import READERS, Reader, hostile

SLOW = ("a packed gigabyte",)
"""Files that take long to make; `benchmarks.attack_files` has them."""

SHARE = 41
"""Of the changes of single values, one in so many is tried, a different one for each reader."""


def outcome(reader: Reader, folder: Path) -> str | None:
    """The message of the library's own error; None if the file was read. Any other error passes."""
    try:
        reader.read(folder)
    except SecateurError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", READERS)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    valid, folder = tmp_path / "valid", tmp_path / "case"
    valid.mkdir()
    reader.write(valid)
    shutil.copytree(valid, folder)
    reader.read(folder)
    refused = 0
    cases = [case for case in hostile(reader, valid, count=20) if case[0] not in SLOW]
    few = cases[:45] + cases[45 + len(name) :: SHARE]
    for what, change in few:
        shutil.rmtree(folder)
        shutil.copytree(valid, folder)
        change(folder)
        said = outcome(reader, folder)
        assert said is None or len(said) <= LONGEST, what
        assert not said or not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", said), what
        refused += said is not None
    assert refused > len(few) / 2  # or nothing was hostile


def test_the_comparison_sees_a_raw_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.config.read.Run.model_validate", lambda values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        test_hostile_files("configuration", tmp_path)


def test_the_limits_are_those_that_are_told() -> None:
    told = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    for limit in (reading.VALUES, reading.CONTAINERS, inputs.ELEMENTS, plan.UNITS, 1 << 24):
        assert f"{limit:,}" in told
    sizes = (
        pair.LARGEST_RECORD,
        plan.LARGEST,
        report.LARGEST,
        tensorfile.LARGEST_HEADER,
        arrays.LARGEST_PACKED,
    )
    for size in sizes:
        assert f"{size >> 20} MiB" in told
    assert f"{read.LARGEST >> 10} KiB" in told
    assert f"in JSON; in YAML | {reading.DEPTH}; {yaml.DEPTH} |" in told
    assert f"{arrays.MOST_PACKED} bytes for each byte of the file; {arrays.MEMBERS} arrays" in told
