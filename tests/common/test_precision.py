"""Products in full float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.common.precision import as_called, full_precision

State = list[object]
OPERATORS = [("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn")]
OPERATORS += [("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")]
NEWER = hasattr(torch.backends.cudnn, "fp32_precision")


def state() -> State:
    """All settings that torch has for float32 products; None for what cannot be read."""
    found: State = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    if NEWER:
        for place in (torch.backends, torch.backends.cudnn, torch.backends.mkldnn):
            found.append(place.fp32_precision)  # type: ignore[attr-defined]
        found += [getattr(getattr(torch.backends, group), name).fp32_precision for group, name in OPERATORS]
    return found


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Other tests start from the settings that a process starts with."""
    yield
    if NEWER:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        for group, name in OPERATORS:
            getattr(torch.backends, group).fp32_precision = "none"
            getattr(getattr(torch.backends, group), name).fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    assert state()[:3] == ["highest", False, True]


def nothing() -> None:
    pass


def coarse() -> None:
    torch.set_float32_matmul_precision("medium")


def newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def all_newer() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


def one_of_two() -> None:
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # while that of convolutions is "tf32"


WAYS = [
    nothing,
    coarse,
    *([newer, all_newer, one_of_two] if hasattr(torch.backends, "fp32_precision") else []),
]


@pytest.mark.parametrize("change", WAYS)
def test_inside_nothing_is_rounded_and_then_all_is_as_before(change: Callable[[], None]) -> None:
    change()
    before = state()
    with full_precision(), full_precision():
        inside = state()
    assert not {"tf32", "bf16", "high", "medium", True} & set(inside)
    assert state() == before
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert state() == before


def test_calls_in_two_threads_that_overlap() -> None:
    torch.set_float32_matmul_precision("high")
    inside, out, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with full_precision():
            inside.set()
            out.wait(10)
            seen.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        assert inside.wait(10)
    assert torch.get_float32_matmul_precision() == "highest"  # the other one is still inside
    out.set()
    thread.join()
    assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "high")


@pytest.mark.parametrize("change", WAYS)
def test_captures_read_these_settings_too(change: Callable[[], None]) -> None:
    """The exporter reads settings of before that torch refuses to read where the newer ones differ."""
    change()
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert sc.trace(net, torch.randn(6, 4)).groups


class Listening(nn.Sequential):
    """Notes how precise products are while it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            HEARD.append(torch.get_float32_matmul_precision())
        return super().forward(x)


HEARD: list[str] = []


def test_every_step_has_it() -> None:
    torch.manual_seed(0)
    net = Listening(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    data = [torch.randn(6, 4) for _ in range(4)]
    torch.set_float32_matmul_precision("high")
    HEARD.clear()
    graph = sc.trace(net, data[0])
    scores = sc.score(graph, data, "reconstruction", progress=False)
    plan = sc.RepairAware().allocate(graph, scores, sc.Budget(macs=0.7))
    small = sc.apply(net, plan, graph=graph)
    assert sc.verify(net, small, plan, data[0]).proven
    sc.repair(small, net, data, "reconstruct", graph=graph, progress=False)
    sc.prune(net, data, sc.Budget(macs=0.7), progress=False, measure_latency=False)
    assert set(HEARD) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def test_what_is_timed_or_trained_has_the_users_settings() -> None:
    torch.manual_seed(0)
    net = Listening(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    graph = sc.trace(net, torch.randn(6, 4))
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude", progress=False))
    small = sc.apply(net, plan, graph=graph)
    torch.set_float32_matmul_precision("high")
    with full_precision():
        HEARD.clear()
        sc.latency([net], (torch.randn(6, 4),), runs=2)
        assert set(HEARD) == {"high"}
        assert torch.get_float32_matmul_precision() == "highest"
        HEARD.clear()
        data = [(torch.randn(6, 4), torch.arange(6) % 2) for _ in range(4)]
        sc.recover(small, net, data, epochs=1, progress=False)
        assert "high" in HEARD
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_call_in_another_thread_is_exact_while_one_trains() -> None:
    torch.set_float32_matmul_precision("high")
    seen = []

    def other() -> None:
        with full_precision():
            seen.append(torch.get_float32_matmul_precision())

    with full_precision(), as_called():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "high")
