"""What the report says of data that are too few for a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.pipeline.shortage import shortage


def wide() -> nn.Sequential:
    """A convolution with 27 columns, 36 positions; one with 72 and 16; and a classifier with 40 and 1."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 40, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(40, 3),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("samples", "lacks"), [(39, True), (40, False), (4, True)])
def test_a_layer_with_fewer_rows_than_columns_is_named(samples: int, lacks: bool) -> None:
    graph = sc.trace(wide(), torch.zeros(2, 3, 8, 8))
    found = shortage(graph, samples)
    expected = (
        f"Few data: {samples} samples give the layer 5 {samples} rows for 40 input columns. "
        "With 50 samples, a fifth held out, it gets one each."
    )
    assert found == (expected if lacks else "")


def test_positions_are_rows() -> None:
    net = nn.Sequential(*wide()[:3], nn.Conv2d(40, 3, 1)).eval()
    graph = sc.trace(net, torch.zeros(2, 3, 8, 8))
    assert shortage(graph, 5) == ""
    assert "layer 2 64 rows for 72 input columns. With 7 samples" in shortage(graph, 4)


@pytest.mark.parametrize("repair", ["reconstruct", None])
def test_the_report_says_it(repair: str | None) -> None:
    data = list(torch.randn(30, 3, 8, 8).split(6))
    result = sc.prune(
        wide(),
        data,
        sc.Budget(macs=0.6),
        "repair_aware",
        repair=repair,
        measure_latency=False,
        progress=False,
    )
    said = "24 samples give the layer 5 24 rows for 40 input columns"
    for face in (str(result.report), result.report.to_markdown()):
        assert (said in " ".join(face.split())) == (repair is not None)
