"""What holds for every test: one thread, fixed seeds, and torchvision imported the way it can be."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch._dynamo import config

from tests.zoo.importing import import_torchvision

# Before any test imports timm or transformers, which import torchvision themselves.
import_torchvision()

# Tests share the cores between processes (see Makefile); more threads in each would only compete.
torch.set_num_threads(1)

# The same examples in every run, and no time limit: the first export in a process is slow.
settings.register_profile("secateur", derandomize=True, deadline=None)
settings.load_profile("secateur")


SLOW = Path(__file__).with_name("slow.txt")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `SLOW`."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    names = {line for line in lines if not line.startswith("#")}
    cases: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        function = name.partition("[")[0]
        other_third = f"{function} 1 of 3" in names and cases[function] % 3 > 0
        cases[function] += 1
        if other_third or not names.isdisjoint((name, function)):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What the imports made stays: the collector need not look at it again and again.

    Nor need it look often at the traces that tests share: a tenth of the time went there.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def torch_settings() -> dict[str, object]:
    """Settings of the process that change what other tests compute."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Every test starts from the same global random state, and leaves torch's settings as they were."""
    before = torch_settings()
    torch.manual_seed(0)
    yield
    assert torch_settings() == before


@pytest.fixture(autouse=True)
def shapes_not_remembered(request: pytest.FixtureRequest) -> None:
    """Captures look up no shapes of earlier calls: in small models this takes longer than to find them.

    Whole architectures are captured as users capture them.
    """
    config.fake_tensor_cache_enabled = "zoo" in request.path.parts
