"""What the pages of docs/ show is run, and gives what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, Block, Reader, blocks_of, pages
from tests.zoo.importing import import_transformers

OWN = {
    "training.md": "tests/integrations/test_docs.py",
    "libraries.md": "tests/libraries/run.py",
    "recipes.md": "tests/libraries/recipes.py",
}
"""Pages whose code needs trainers, libraries and data around it, and what brings these."""


def cases() -> list[object]:
    """Every page; those that start processes are slow."""
    found: list[object] = []
    for page in pages():
        if page.relative_to(DOCS).as_posix() in OWN:
            continue
        code = "\n".join(block.text for block in blocks_of(page) if block.language in ("sh", "console"))
        marks = [pytest.mark.slow] if "torchrun" in code else []
        found.append(pytest.param(page, id=page.relative_to(DOCS).as_posix(), marks=marks))
    return found


@pytest.mark.parametrize("page", cases())
def test_a_reader_can_follow_the_page(page: Path, desk: Path) -> None:
    if "from transformers" in page.read_text(encoding="utf-8") and import_transformers() is None:
        pytest.skip("transformers is not installed")
    reader = Reader()
    for block in blocks_of(page):
        reader.follow(block)


def test_pages_that_are_left_out_have_tests_of_their_own() -> None:
    for name, test in OWN.items():
        assert (DOCS / name).is_file()
        assert Path(name).name in (ROOT / test).read_text(encoding="utf-8")


def test_the_pages_hold_code() -> None:
    """So that a change of how blocks are written does not leave them all unread."""
    languages = [block.language for page in pages() for block in blocks_of(page)]
    assert languages.count("python") > 60
    assert languages.count("console") > 5


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", ">>> 1 + 1\n3\n"),
        ("python", "assert False\n"),
        ("console", "$ python say.py\nsomething else\n"),
        ("console", "$ secateur no-such-command\n"),
        ("console", "$ rm -r thing\n"),
        ("sh", "make no-such-target\n"),
        ("sh", "pip install '.[report,no_such_extra]'\n"),
        ("sh", "python -m benchmarks.no_such_benchmark\n"),
        ("ruby", "puts 1\n"),
    ],
)
def test_a_page_that_does_not_tell_the_truth_fails(language: str, text: str, desk: Path) -> None:
    reader = Reader()
    reader.follow(Block("python", "say.py", "print('this')\n", "here:1"))
    reader.follow(Block("console", "", "$ python say.py\nth...\n", "here:2"))
    with pytest.raises((AssertionError, SystemExit)):
        reader.follow(Block(language, "", text, "here:3"))


def test_every_page_is_on_the_site() -> None:
    trees = [block.text for page in pages() for block in blocks_of(page) if block.language == "toctree"]
    listed = {entry for tree in trees for entry in tree.split() if not entry.startswith(":")}
    found = {page.relative_to(DOCS).with_suffix("").as_posix() for page in pages()} - {"index"}
    assert found <= listed, found - listed


def test_links_between_pages_lead_somewhere() -> None:
    for page in pages():
        for target in re.findall(r"\]\(([^)#:\s]+\.\w+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.relative_to(DOCS)}: {target}"
