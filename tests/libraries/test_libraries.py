"""The committed results, and that the comparison behind them can fail; `make test-libraries` makes them."""

from __future__ import annotations

import copy

import torch
from torch import nn

import secateur as sc
from tests.libraries import run
from tests.libraries.case import Case
from tests.libraries.page import PAGE, page
from tests.libraries.walk import Found, check_sizes, check_training, walk


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


CASE = Case("net", "secateur", Net, lambda batch, size: (torch.randn(batch, size, 4),), (5, 7))


def test_a_small_network_passes_every_check() -> None:
    found = walk(CASE)
    assert found.form == "module"
    assert len(found.checks) >= 9
    assert set(found.checks.values()) == {"ok"}


def test_a_network_that_computes_something_else_is_found_out() -> None:
    model = CASE.model()
    spoilt = copy.deepcopy(model)
    with torch.no_grad():
        spoilt.get_parameter("second.weight")[0, 0] += 1
    found = Found("net", "secateur")
    check_sizes(found, CASE, model, spoilt)
    check_training(found, CASE, model, spoilt)
    assert all(what.startswith("WRONG") for what in found.checks.values())
    assert len(run.faults({"checks": found.checks}, {})) == len(found.checks) == 7


def test_what_worked_before_may_not_be_refused() -> None:
    found = {"checks": {"predict": "refused InputError: no", "train": "refused InputError: no"}}
    before = {"checks": {"predict": "ok", "train": "refused InputError: no"}}
    assert run.faults(found, before) == ["predict: refused InputError: no"]


def test_what_a_dense_model_cannot_do_is_no_fault() -> None:
    found = Found("net", "secateur")
    found.check("size 3", lambda: 1 / 0, lambda _: "")
    found.check("size 4", lambda: 1, lambda _: 1 / 0)
    found.check("size 5", lambda: 1, lambda _: sc.record_of(nn.Linear(1, 1)))
    assert [what.split()[0] for what in found.checks.values()] == ["dense", "crash", "refused"]


def test_the_page_is_made_of_the_committed_results() -> None:
    assert PAGE.read_text() == page(list(run.read().values()))
