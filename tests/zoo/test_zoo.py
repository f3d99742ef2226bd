"""Every architecture goes through the whole pipeline; see `tests.zoo.walk` for what is checked on the way."""

from __future__ import annotations

import pytest

from tests.zoo.entry import Entry
from tests.zoo.models import ENTRIES, ZOO
from tests.zoo.walk import TOLERANCE, walk

QUICK = frozenset({"unet", "grouped_queries"})
"""Those that `make test` runs too."""


def _marked(entry: Entry) -> object:
    return pytest.param(entry, id=entry.name, marks=() if entry.name in QUICK else pytest.mark.slow)


def test_the_zoo_is_as_large_as_promised() -> None:
    names = [entry.name for entry in ZOO]
    assert len(set(names)) == len(names) >= 70
    assert {entry.family for entry in ZOO} == {"torchvision", "timm", "transformers", "plain"}


@pytest.mark.filterwarnings("ignore")  # the libraries' own, which differ from version to version
@pytest.mark.parametrize("entry", [_marked(e) for e in ZOO if e not in ENTRIES])  # those: test_architectures
def test_traced_pruned_verified_saved_and_loaded(entry: Entry) -> None:
    if not entry.available():
        pytest.skip(f"{entry.family} is not installed")
    found = walk(entry)
    assert found.groups > 0
    assert found.macs < 1
    assert found.proof_graph <= TOLERANCE
    assert found.proof_auto <= TOLERANCE
    assert found.elsewhere <= TOLERANCE
    assert not found.frozen, "operators without a rule"
