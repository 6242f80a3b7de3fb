"""What all plots share: size, axes, legend, file. matplotlib without pyplot: it needs no display and keeps no state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ultrafuser_mega.reporting.palette import FAINT, INK, MUTED

WIDTH_IN = 10.0  # at DPI: 1600 pixels, twice the width of a README
DPI = 160


def panels_of(rows: int, columns: int, height_in: float) -> tuple[Figure, np.ndarray]:
    """A figure and its panels, row by row."""
    figure = Figure(figsize=(WIDTH_IN, rows * height_in + 0.4), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def style(axes: Axes, title: str) -> None:
    """A title, light lines, no frame."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.grid(visible=True, axis="y", color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """One below all panels."""
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=min(len(handles), 6),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )


def save(figure: Figure, path: str | Path) -> Path:
    """As a PNG, in a folder that is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
    return path
