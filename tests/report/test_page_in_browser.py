"""The page as a browser shows it: at two widths, light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.report.data import Kept, Layer
from secateur.report.html import render
from tests.report.browser import WIDTHS, look
from tests.report.reports import CERTIFICATES, PROTECTION, REMOVAL, report
from tests.report.test_frontier import LOOKED

LONG = "transformer.encoder.layers.11.attention.output.dense_projection"


def busy() -> str:
    """A page with long names, big numbers and every section, all of it unfolded."""
    layers = tuple(
        Layer(group=f"{LONG}.{i}", kept=3000, total=4096, producers=("w",), scores=(REMOVAL, PROTECTION))
        for i in range(30)
    )
    refits = {f"{LONG}.{i}.weight": {"damping": 1e-3, "before": 0.5, "after": 1e-5} for i in range(3)}
    page = render(
        report(
            model="A" * 60,
            layers=layers,
            untouched=tuple(Kept(what=f"{LONG}.{i}", reason="mixed", where="net.py:1") for i in range(9)),
            frontier=LOOKED,
            certificates=CERTIFICATES | {"groups": {LONG: CERTIFICATES["groups"]["stem"]}},
            repairs=(
                {
                    "method": "reconstruct",
                    "kept": True,
                    "measure": "loss",
                    "before": 3.63,
                    "after": 0.56,
                    "held_out_samples": 60,
                    "layers": refits,
                },
            ),
        )
    )
    return page.replace("<details>", "<details open>")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_readable_at_every_width(tmp_path: Path, dark: bool) -> None:
    frames, said = look(busy(), tmp_path, dark=dark)
    assert said == []
    assert [frame["width"] for frame in frames] == list(WIDTHS)
    for frame in frames:
        assert frame["found"] == []
        assert frame["drawn"] == 2 + 1 + 1 + 60  # the passes, both curves, and two histograms a layer
        assert frame["background"] == ("rgb(20, 24, 22)" if dark else "rgb(246, 247, 245)")


def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    page = (
        "<!DOCTYPE html><body><section style='width:100px'>"
        "<p style='white-space:nowrap'>leaves its own card</p></section>"
        "<p style='font-size:8px'>small</p><p style='color:#aaa'>faint</p>"
        "<div style='width:2000px'>wide</div><div class='ends' style='width:20px;display:flex'>"
        "<span style='width:10px;flex:none;margin-right:-9px'>1</span><span>2</span></div>"
        "<script>console.error('said')</script>"
    )
    frames, said = look(page, tmp_path, dark=False)
    assert len(said) == len(WIDTHS)
    for frame in frames:
        kinds = {line.partition(":")[0] for line in frame["found"]}
        assert {"leaves its card", "small", "faint", "scrolls sideways", "labels overlap"} <= kinds
