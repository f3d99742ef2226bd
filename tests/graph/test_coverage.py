"""What may happen to every parameter, and why."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from tests.graph.tiny import Calls


def test_everything_but_the_output_of_a_plain_network() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    found = sc.trace(net, torch.randn(2, 3)).coverage()
    assert {p.name: p.status for p in found.parameters} == {
        "0.weight": "prunable", "0.bias": "prunable", "2.weight": "prunable", "2.bias": "protected"
    }  # fmt: skip
    assert found.parameters[-1].reasons == ("model output",)
    assert found.macs_share == 1.0
    assert found.params_share == (3 * 8 + 8 + 8 * 2) / (3 * 8 + 8 + 8 * 2 + 2)


def test_shares_and_reasons_where_something_stands_in_the_way() -> None:
    net = Calls(
        lambda m, x: m.d(F.relu(m.c(torch.fft.fft(m.b(F.layer_norm(m.a(x), (4,)))).real))),
        a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 6), d=nn.Linear(6, 2),
    )  # fmt: skip
    graph = sc.trace(net, torch.randn(2, 3))
    found = graph.coverage()
    by_name = {p.name: p for p in found.parameters}
    assert by_name["a.weight"].status == "protected"
    assert "layer_norm" in by_name["a.weight"].reasons[0]
    assert by_name["b.bias"].status == "frozen"
    assert any("fft" in reason and "tiny.py" in reason for reason in by_name["b.bias"].reasons)
    assert by_name["c.weight"].status == "prunable"
    macs = {"a": 3 * 4, "b": 4 * 5, "c": 5 * 6, "d": 6 * 2}
    assert found.macs_share == (macs["c"] + macs["d"]) / sum(macs.values())
    inexact = sc.trace(net, torch.randn(2, 3), allow_inexact=True).coverage()
    assert inexact.macs_share == 1.0


def test_it_reads_as_text() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    text = str(sc.trace(net, torch.randn(2, 3)).coverage())
    assert text.splitlines()[0].startswith("100.0% of the MACs and")
    assert "protected: 2.bias: model output" in text
