"""The PNG plots of an evaluation: bars with intervals; a radar (the paper's figure 1); lines (its figures 4 and 7).

Scores come as model -> benchmark or domain -> (score, low, high), in the unit of the table; what a model lacks is left
out. One colour per model, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.canvas import DPI, WIDTH_IN, legend, panels_of, save, style
from ultrafuser_mega.reporting.palette import COLORS, FAINT, INK, MUTED

#: model -> column -> (score, low, high)
Scores = Mapping[str, Mapping[str, tuple[float, float, float]]]


def plot_bars(path: str | Path, scores: Scores, unit: str = "%") -> Path:
    """A group of bars for every column, a bar with its interval for every model.

    Raises:
        InputError: there is no score.
    """
    columns = _columns("plot_bars", scores)
    figure, (axes,) = panels_of(1, 1, height_in=3.6)
    style(axes, "Scores, with 95 % intervals")
    width = 0.8 / len(scores)
    for place, (model, own) in enumerate(scores.items()):
        shown = [(index, own[name]) for index, name in enumerate(columns) if name in own]
        x = [index - 0.4 + width * (place + 0.5) for index, _ in shown]
        axes.bar(x, [score for _, (score, _, _) in shown], width * 0.92, color=_color(place), label=model)
        axes.errorbar(
            x,
            [score for _, (score, _, _) in shown],
            yerr=_reach([values for _, values in shown]),
            fmt="none",
            ecolor=INK,
            elinewidth=0.9,
            capsize=1.8,
            capthick=0.9,
        )
    axes.set_xticks(range(len(columns)), columns, color=INK)
    axes.set_ylabel(unit, fontsize=9, color=MUTED)
    axes.set_ylim(bottom=0)
    legend(figure, [Patch(color=_color(place), label=model) for place, model in enumerate(scores)])
    return save(figure, path)


def plot_lines(path: str | Path, panels: Mapping[str, Scores], unit: str = "%") -> Path:
    """A panel for each of ``panels`` (title -> scores): its columns side by side, a line with intervals per model.

    Raises:
        InputError: a panel has no score.
    """
    figure, grid = panels_of(1, len(panels), height_in=3.2)
    for axes, (title, scores) in zip(grid, panels.items(), strict=True):
        columns = _columns("plot_lines", scores)
        style(axes, title)
        for place, own in enumerate(scores.values()):
            shown = [(index, own[name]) for index, name in enumerate(columns) if name in own]
            shift = 0.03 * (place - (len(scores) - 1) / 2)  # so that intervals do not cover each other
            axes.errorbar(
                [index + shift for index, _ in shown],
                [score for _, (score, _, _) in shown],
                yerr=_reach([values for _, values in shown]),
                fmt="o-",
                color=_color(place),
                linewidth=1.5,
                markersize=4,
                elinewidth=0.9,
                capsize=1.8,
            )
        axes.set_xticks(range(len(columns)), columns, color=INK, rotation=30 if len(columns) > 4 else 0)
        axes.set_ylim(bottom=0)
    grid[0].set_ylabel(unit, fontsize=9, color=MUTED)
    legend(figure, _handles(next(iter(panels.values()))))
    return save(figure, path)


def plot_radar(path: str | Path, panels: Mapping[str, Scores]) -> Path:
    """A panel for each of ``panels`` (title -> scores): an axis per column, whose rim is the best model's score.

    Raises:
        InputError: a panel has no score, or fewer than three columns.
    """
    figure = Figure(figsize=(WIDTH_IN, 0.95 * WIDTH_IN / max(2, len(panels))), dpi=DPI, layout="constrained")
    for place, (title, scores) in enumerate(panels.items()):
        columns = _columns("plot_radar", scores)
        if len(columns) < 3:
            raise InputError(f"plot_radar: {title} has {len(columns)} axes; a radar needs three")
        best = {name: max(own[name][0] for own in scores.values() if name in own) for name in columns}
        axes = figure.add_subplot(1, len(panels), place + 1, projection="polar")
        angles = [2 * math.pi * index / len(columns) for index in range(len(columns))]
        axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        axes.set_title(title, fontsize=10.5, color=INK, fontweight="bold")
        axes.set_xticks(angles, [f"{name}\n{best[name]:.1f}" for name in columns], color=INK, fontsize=8.5)
        axes.tick_params(axis="x", pad=9)
        axes.set_yticks([0.25, 0.5, 0.75, 1.0], [""] * 4)
        axes.set_ylim(0, 1.05)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.spines["polar"].set_color(FAINT)
        for number, own in enumerate(scores.values()):
            radii = [own[name][0] / (best[name] or 1.0) if name in own else 0.0 for name in columns]
            axes.plot([*angles, angles[0]], [*radii, radii[0]], color=_color(number), linewidth=1.6)
            axes.fill(angles, radii, color=_color(number), alpha=0.08)
    legend(figure, _handles(next(iter(panels.values()))))
    return save(figure, path)


def _columns(caller: str, scores: Scores) -> list[str]:
    columns = list(dict.fromkeys(name for own in scores.values() for name in own))
    if not columns:
        raise InputError(f"{caller}: no score to draw")
    return columns


def _reach(values: list[tuple[float, float, float]]) -> np.ndarray:
    """(2, n) how far the intervals reach down and up."""
    ends = np.array(values, dtype=float).reshape(-1, 3)
    return np.maximum(np.stack([ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 0]]), 0.0)


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def _handles(scores: Scores) -> list[Line2D]:
    return [Line2D([], [], color=_color(place), linewidth=1.8, label=model) for place, model in enumerate(scores)]
