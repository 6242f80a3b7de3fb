"""Samples on a plane, in the colours of their classes (UltraFuser, figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import numpy as np
from matplotlib.lines import Line2D

from ultrafuser_mega.reporting.canvas import legend, panels_of
from ultrafuser_mega.reporting.palette import FAINT, specialist_colors

_HEIGHT_IN = 7.0


def plot_classes(points: Mapping[str, np.ndarray]) -> bytes:
    """A PNG.

    Args:
        points: class -> (n, 2).
    """
    figure, (axes,) = panels_of(1, 1, _HEIGHT_IN)
    colors = specialist_colors(list(points))
    every = np.concatenate(list(points.values()))
    order = np.random.default_rng(0).permutation(len(every))  # no class lies over all others
    shades = np.repeat(list(colors.values()), [len(part) for part in points.values()])
    size = float(np.clip(4000 / len(every), 1.5, 18))
    axes.scatter(*every[order].T, s=size, c=shades[order].tolist(), alpha=0.65, linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_color(FAINT)
    marks = [
        Line2D([], [], marker="o", linestyle="", color=color, label=f"{name} ({len(points[name]):,})")
        for name, color in colors.items()
    ]
    legend(figure, marks)
    image = BytesIO()
    figure.savefig(image, format="png", facecolor="white", dpi=110)
    return image.getvalue()
