"""Accuracy against MACs of one network, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.frontier.summary import AUTO, COMES, OURS, REFRESHED, REPAIRED, Cell, best, points, rows


def lines(content: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """What is drawn: each rule of ours repaired; of each peer the best at every point, both ways."""
    of, at = rows(content), points(content)
    found: dict[str, list[Cell]] = {}
    for row in of:
        if row.side == OURS and row.stage == REPAIRED:
            found[row.rule] = [row.cells[p] for p in at if p in row.cells]
    for side in dict.fromkeys(row.side for row in of if row.side != OURS):
        for stage, words in ((COMES, "as it comes"), (REFRESHED, "batch norms re-estimated")):
            leaders = ((best((r for r in of if r.side == side and r.stage == stage), p), p) for p in at)
            found[f"{side}, best, {words}"] = [leader.cells[p] for leader, p in leaders if leader is not None]
    return {name: cells for name, cells in found.items() if cells}


def draw(content: Mapping[str, Any], folder: Path = results.FOLDER) -> Path:
    """Writes ``frontier_<network>.svg``; the same results give the same bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "secateur"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    dense = 100 * content["dense_top1"]
    axes.axhline(dense, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate("dense", (1, dense), color="0.4", ha="right", va="bottom", fontsize=8)
    ours = {row.rule for row in rows(content) if row.side == OURS}
    colours = iter(plt.get_cmap("tab20").colors)
    for name, cells in lines(content).items():
        auto = name == AUTO
        axes.errorbar(
            [cell.macs for cell in cells],
            [cell.mean for cell in cells],
            [cell.spread for cell in cells],
            color="black" if auto else next(colours),
            linewidth=2.2 if auto else 1.2,
            linestyle="-" if name in ours else "--",
            marker="o" if name in ours else "s",
            markersize=4,
            capsize=2,
            zorder=3 if auto else 2,
            label=name,
        )
    axes.set_xlim(right=1.0)
    axes.set_xlabel("MACs, share of the dense network's")
    axes.set_ylabel("top-1 in %, mean ± standard deviation")
    axes.set_title(content["network"])
    axes.grid(color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    path = folder / f"frontier_{content['network']}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
