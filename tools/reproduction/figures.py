"""The paper's figures 5, 6, 7 and 8/9 from what was measured, in the project's colours."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from reproduction.measured import Measured
from reproduction.rows import BTX, LLAMAFUSER, ULTRAFUSER, further_tuned
from reproduction.trios import FUSED_RUN, Trio
from reproduction.verdicts import Spread
from ultrafuser_mega.reporting.canvas import legend, panels_of, save, style
from ultrafuser_mega.reporting.palette import COLORS, INK, MUTED, specialist_colors
from ultrafuser_mega.reporting.plots import moving_average


def draw(out: Path, measured: Measured, trios: Sequence[Trio]) -> list[Path]:
    """All that there are numbers for, in ``out``/plots; figure 6 and the coloured tokens are the first seed's."""
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    found = []
    if measured.curves.get(ULTRAFUSER):
        found.append(plot_curves(plots / "figure_5_training_loss.png", measured))
    run_dir = trios[0].config.runs / FUSED_RUN
    if (run_dir / "plots" / "gate_heatmap.png").is_file():
        found.append(plots / "figure_6_gate_per_sample.png")
        shutil.copyfile(run_dir / "plots" / "gate_heatmap.png", found[-1])
    if any(further_tuned(name) in measured.losses for name in measured.specialists):
        found.append(plot_further_tuning(plots / "figure_7_further_tuning.png", measured))
    if (run_dir / "plots" / "token_gate.html").is_file():
        shutil.copyfile(run_dir / "plots" / "token_gate.html", plots / "figures_8_9_tokens.html")
    return found


def plot_curves(path: Path, measured: Measured) -> Path:
    """Figure 5: training loss over samples, the mean over seeds, from the lowest to the highest seed shaded."""
    figure, (axes,) = panels_of(1, 1, height_in=3.6)
    style(axes, "Training loss (nats per response token)")
    handles = []
    for row, color in ((ULTRAFUSER, INK), (LLAMAFUSER, COLORS[0]), (BTX, COLORS[1])):
        curves = measured.curves.get(row, [])
        if not curves:
            continue
        steps = min(len(curve) for curve in curves)
        samples = [taken for taken, _ in curves[0][:steps]]
        losses = [np.array([loss for _, loss in curve[:steps]]) for curve in curves]
        smooth = np.stack([moving_average(one, max(1, steps // 25)) for one in losses])
        axes.plot(samples, smooth.mean(0), color=color, linewidth=1.8)
        axes.fill_between(samples, smooth.min(0), smooth.max(0), color=color, alpha=0.15, linewidth=0)
        handles.append(Line2D([], [], color=color, linewidth=1.8, label=row))
    axes.set_xlabel("samples", fontsize=9, color=MUTED)
    legend(figure, handles)
    return save(figure, path)


def plot_further_tuning(path: Path, measured: Measured) -> Path:
    """Figure 7: a panel for each specialist; its loss by class before and after further training, and UltraFuser's."""
    figure, grid = panels_of(1, len(measured.specialists), height_in=3.2)
    colors = specialist_colors(measured.specialists)
    for axes, name in zip(grid, measured.specialists, strict=True):
        style(axes, name)
        for row, color, line in (
            (name, colors[name], "--"),
            (further_tuned(name), colors[name], "-"),
            (ULTRAFUSER, INK, "-"),
        ):
            if row not in measured.losses:
                continue
            spreads = [Spread.of(measured.losses[row][of_class]) for of_class in measured.classes]
            reach = [one.reach if np.isfinite(one.reach) else 0.0 for one in spreads]
            axes.errorbar(
                range(len(spreads)), [one.mean for one in spreads], yerr=reach, fmt="o", linestyle=line, color=color,
                linewidth=1.5, markersize=4, elinewidth=0.9, capsize=1.8,
            )  # fmt: skip
        axes.set_xticks(range(len(measured.classes)), measured.classes, color=INK)
        axes.margins(0.08)
        axes.set_ylim(bottom=0)
    grid[0].set_ylabel("held-out loss", fontsize=9, color=MUTED)
    legend(
        figure,
        [
            Line2D([], [], color=MUTED, linestyle="--", label="specialist"),
            Line2D([], [], color=MUTED, label="specialist + FT"),
            Line2D([], [], color=INK, label=ULTRAFUSER),
        ],
    )
    return save(figure, path)
