"""The reference names all that is public, and what it names has examples, which run as doctests of src."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

import secateur as sc
from secateur import elsewhere
from secateur.cli.main import app
from tests.docs.pages import DOCS

LISTED = re.compile(r"^\.\. auto(?:function|class|exception):: ([\w.]+)$", re.MULTILINE)

ELSEWHERE = (
    "secateur.targets.blocks",
    "secateur.pipeline.prune",
    "secateur.pipeline.compare",
    "secateur.targets.experts",
    "secateur.pipeline.auto",
)
"""Modules, and what is in them, that take a page to show: the quick start, the guide to experts, ..."""

BASES = {"Allocator", "Signal"}
"""To derive from; docs/extending has the examples."""


def page(name: str) -> str:
    return (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")


def shown() -> list[str]:
    """What has to have an example: no errors, and nothing that only calls make."""
    listed = [name for part in ("steps", "rules", "signals") for name in LISTED.findall(page(part))]
    listed = [name.rpartition(".")[2] for name in listed]
    modules = {name: str(inspect.getmodule(getattr(sc, name)).__name__) for name in listed}  # type: ignore[union-attr]
    return [n for n, module in modules.items() if n not in BASES and not module.startswith(ELSEWHERE)]


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [path.stem for path in sorted((DOCS / "reference").glob("*.md")) if path.stem != "building"]
    listed = [name for each in pages for name in LISTED.findall(page(each))]
    in_modules = [f"{module}.{name}" for module, names in elsewhere.NAMES.items() for name in names]
    assert sorted(listed) == sorted([*sc.__all__, *in_modules])


@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m, names in elsewhere.NAMES.items() for name in names]
)
def test_names_of_modules_are_found_at_the_top_too(module: str, name: str) -> None:
    assert getattr(sc, name) is getattr(importlib.import_module(module), name)
    assert name not in sc.__all__


def test_modules_are_reachable_without_an_import() -> None:
    for name in elsewhere.MODULES:
        assert getattr(sc, name) is importlib.import_module(f"secateur.{name}")
        assert name in dir(sc)
    with pytest.raises(AttributeError, match="'secateur' has no attribute 'nothing'"):
        _ = sc.nothing


def test_every_command_is_in_the_reference() -> None:
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    assert set(re.findall(r"^\| `secateur ([\w-]+)` \|", page("commands"), re.MULTILINE)) == commands


@pytest.mark.parametrize("name", shown())
def test_what_is_public_has_an_example(name: str) -> None:
    found = getattr(sc, name)
    assert ">>> " in (found.__doc__ or ""), f"{found.__module__}.{name}: the docstring has no example"
