"""Draw the cost curve of a rule's knob."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.artefact.writing import replacing
from secateur.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from secateur.allocators import Curve

SUFFIXES = (".svg", ".png", ".pdf")


def check(path: Path) -> None:
    """Check that a picture can be drawn into this file.

    Raises:
        SettingError: If the suffix is not one of `SUFFIXES`, the folder does not exist or cannot be
            written to, or matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise SettingError(
            f"plot {str(path)!r}: expected a file that ends in {', '.join(SUFFIXES)}, got {path.suffix!r}. "
            "Name curve.svg, for example."
        )
    if not os.access(path.parent, os.W_OK):
        raise SettingError(
            f"plot {str(path)!r}: expected a folder that can be written to, got {str(path.parent)!r}. "
            "Name another."
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SettingError(
            f"plot: expected matplotlib, which draws the curve, got {error}. "
            'Run pip install "secateur[plot]".'
        ) from error


def draw(curve: Curve, path: Path, title: str) -> None:
    """Draw the cost against the knob, and below it the share of units that each layer keeps.

    The same curve gives the same bytes.

    Args:
        curve: The curve.
        path: The file. Its suffix gives the format.
        title: The title of the picture.

    Raises:
        SettingError: If `check` refuses the file.
    """
    check(path)
    from matplotlib.figure import Figure

    # Each point of the step function holds up to the next. The first point, where nothing is removed,
    # is at minus infinity; it is drawn from 0, or a little left of the second point.
    knob = curve.knob.copy()
    end = max(1.0, float(knob[-1])) if len(knob) > 1 else 1.0
    knob[0] = min(0.0, float(knob[1]) - 0.02 * end) if len(knob) > 1 else 0.0
    edges = np.append(knob, end + 0.02 * end)
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    cost, layers = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    cost.stairs(100 * curve.macs / max(int(curve.macs[0]), 1), edges, baseline=None, label="MACs")
    cost.stairs(100 * curve.params / max(int(curve.params[0]), 1), edges, baseline=None, label="parameters")
    cost.set(ylabel="% of dense", ylim=(0, 103), title=title)
    cost.grid(alpha=0.3)
    cost.legend()
    shares = 100 * (curve.kept / curve.sizes).T
    rows = np.arange(len(curve.groups) + 1)
    image = layers.pcolormesh(edges, rows, shares, vmin=0, vmax=100, cmap="viridis", rasterized=True)
    if len(curve.groups) <= 60:
        layers.set_yticks(rows[:-1] + 0.5, curve.groups, fontsize=7)
    layers.invert_yaxis()
    layers.set(xlabel=curve.knob_name)
    figure.colorbar(image, ax=layers, label="% of units kept")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure without a date, so that the same one gives the same bytes.

    Raises:
        SettingError: If the file cannot be written.
    """
    import matplotlib as mpl

    metadata: dict[str, Any] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
    with replacing(path, SettingError) as partial, mpl.rc_context({"svg.hashsalt": "secateur"}):
        figure.savefig(partial, dpi=150, metadata=metadata[path.suffix.lower()])
