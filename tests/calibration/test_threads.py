"""The random generators that all threads share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import secateur as sc
from secateur.calibration import Calibration, seeded
from tests.helpers.models import build
from tests.signals.data import labelled


class Drawing:
    """A loader that draws from the global generators, as those that shuffle do."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in labelled("mlp"):
            yield x + 0.1 * torch.randn(x.shape, dtype=x.dtype) + np.random.rand(), y  # noqa: NPY002


def test_two_threads_give_what_one_after_the_other_gives() -> None:
    nets = [build("mlp", seed=k) for k in range(2)]
    graphs = [sc.trace(net, labelled("mlp")[0][0]) for net in nets]

    def scored(k: int) -> Any:
        return sc.score(graphs[k], Drawing(), ("wasserstein", "taylor", "random"), progress=False).values

    before, alone = torch.get_rng_state(), [scored(k) for k in range(2)]
    for _ in range(4):
        found: dict[int, Any] = {}

        def keep(k: int, found: dict[int, Any] = found) -> None:
            found[k] = scored(k)

        threads = [threading.Thread(target=keep, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k, expected in enumerate(alone):
            for signal, groups in expected.items():
                assert all(np.array_equal(found[k][signal][g], v) for g, v in groups.items())
    assert torch.equal(before, torch.get_rng_state())


def test_two_threads_trace() -> None:
    expected = [str(sc.trace(build(name), labelled(name)[0][0])) for name in ("mlp", "plain")]
    found: dict[int, str] = {}

    def traced(k: int, name: str) -> None:
        found[k] = str(sc.trace(build(name), labelled(name)[0][0]))

    threads = [threading.Thread(target=traced, args=pair) for pair in enumerate(("mlp", "plain"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected


def test_a_thread_waits_until_the_generators_are_free() -> None:
    held, seen = threading.Event(), []

    def read() -> None:
        held.wait()
        seen.extend(batch.args[0] for batch in Calibration.of(Drawing()))

    thread = threading.Thread(target=read)
    thread.start()
    with seeded(3):
        held.set()
        time.sleep(0.05)
        assert not seen
        drawn = torch.rand(3)
    thread.join()
    with seeded(3):
        assert torch.equal(drawn, torch.rand(3))
    assert seen
