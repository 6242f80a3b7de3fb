"""The PNG plots of runs: losses, gate weights per held-out sample, gate weights over training, runs compared.

matplotlib's object-oriented API alone: no pyplot, no global state, no display needed. Every function
draws one file and returns its path. Colours: palette.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.canvas import DPI, WIDTH_IN, legend, panels_of, save, style
from ultrafuser_mega.reporting.palette import COLORS, FAINT, INK, MUTED, specialist_colors
from ultrafuser_mega.reporting.records import FUSED, EvalRecord, StepRecord

_PANELS_PER_ROW = 3
_TRAIN = "#8c959f"
_HALO = [withStroke(linewidth=3, foreground="white")]


def plot_losses(path: str | Path, steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> Path:
    """Loss curves, one panel per class.

    Each panel: the training loss (faint; its moving average solid), the fused model's held-out loss
    (dots), the best single specialist's held-out loss where it was first evaluated (dashed), and the
    boundary between the stages.

    Raises:
        InputError: there is no training step to draw.
    """
    _need_steps("plot_losses", steps)
    classes = _class_names([record.class_loss for record in steps])
    colors = specialist_colors(_class_names([weights for record in evals for weights in record.gate.values()]))
    figure, panels = _panels(classes, height_in=2.9)
    x = np.array([record.step for record in steps], dtype=float)  # (S,)
    for name, axes in panels.items():
        raw = np.array([record.class_loss.get(name, math.nan) for record in steps], dtype=float)  # (S,)
        average = moving_average(raw, window=max(1, len(steps) // 25))  # (S,)
        axes.plot(x, raw, color=_TRAIN, linewidth=0.7, alpha=0.3)
        axes.plot(x, average, color=_TRAIN, linewidth=1.6)
        held_out = [(record.step, record.loss[name][FUSED]) for record in evals if FUSED in record.loss.get(name, {})]
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), "o-", color=INK, linewidth=1.0, markersize=4, markeredgecolor="white"
            )
        best = _best_specialist(evals, name)
        if best is not None:
            label, loss = best
            color = colors.get(label, MUTED)
            axes.axhline(loss, color=color, linewidth=1.3, linestyle=(0, (5, 3)))
            is_beaten = bool(held_out) and held_out[-1][1] < loss  # then the fused curve ends below: write above
            axes.annotate(
                f"{label} alone {loss:.2f}",
                (0.98, loss),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4 if is_beaten else -4),
                textcoords="offset points",
                ha="right",
                va="bottom" if is_beaten else "top",
                color=color,
                fontsize=8.5,
                path_effects=_HALO,
            )
        axes.set_ylim(
            *_limits([average, np.array([loss for _, loss in held_out]), np.array([best[1]] if best else [])])
        )
        _mark_stages(axes, steps)
    _label_edges(panels, x="step", y="loss (nats per token)")
    legend(
        figure,
        [
            Line2D([], [], color=_TRAIN, linewidth=1.6, label="fused, training (moving average)"),
            Line2D([], [], color=INK, marker="o", markersize=4, linewidth=1.0, label="fused, held out"),
            Line2D([], [], color=MUTED, linewidth=1.3, linestyle=(0, (5, 3)), label="best specialist alone, held out"),
        ],
    )
    return save(figure, path)


def plot_gate_over_steps(path: str | Path, steps: Sequence[StepRecord]) -> Path:
    """Average gate weight per token of every specialist over the training steps, one panel per class.

    Raises:
        InputError: there is no training step to draw.
    """
    _need_steps("plot_gate_over_steps", steps)
    classes = _class_names([record.gate for record in steps])
    specialists = _class_names([weights for record in steps for weights in record.gate.values()])
    colors = specialist_colors(specialists)
    figure, panels = _panels(classes, height_in=2.7)
    x = np.array([record.step for record in steps], dtype=float)  # (S,)
    window = max(1, len(steps) // 50)
    values = [value for record in steps for weights in record.gate.values() for value in weights.values()]
    top = min(1.0, 1.15 * max(filter(math.isfinite, values), default=1.0))
    for name, axes in panels.items():
        axes.axhline(1 / len(specialists), color=FAINT, linewidth=1.2, zorder=0)
        for specialist in specialists:
            raw = np.array([record.gate.get(name, {}).get(specialist, math.nan) for record in steps])  # (S,)
            axes.plot(x, raw, color=colors[specialist], linewidth=0.7, alpha=0.3)
            axes.plot(x, moving_average(raw, window), color=colors[specialist], linewidth=1.8)
        axes.set_ylim(0, top)
        _mark_stages(axes, steps)
    _label_edges(panels, x="step", y="gate weight per token")
    handles = [Line2D([], [], color=colors[name], linewidth=1.8, label=name) for name in specialists]
    legend(figure, [*handles, Line2D([], [], color=FAINT, linewidth=1.2, label="equal weights")])
    return save(figure, path)


def plot_gate_heatmap(
    path: str | Path,
    sample_classes: Sequence[str],
    weights: np.ndarray,  # (S, n) average gate weight over each sample's response tokens
    specialists: Sequence[str],
) -> Path:
    """The paper's figure 6: one panel per class, a column per held-out sample, a row per specialist,
    darker for more weight. The number right of a row is the average gate weight per sample, which gives short
    responses the same say as long ones (the tables' is per token); the largest is bold.

    Raises:
        InputError: no sample, or shapes that do not fit together.
    """
    weights = np.asarray(weights, dtype=float)
    expected = (len(sample_classes), len(specialists))
    if weights.shape != expected or 0 in expected:
        raise InputError(f"plot_gate_heatmap: weights {weights.shape} for (samples, specialists) {expected}")
    classes = list(dict.fromkeys(sample_classes))
    n = len(specialists)
    figure = Figure(figsize=(WIDTH_IN, 0.7 + len(classes) * (0.5 + 0.27 * n)), dpi=DPI, layout="constrained")
    all_axes = list(np.atleast_1d(figure.subplots(len(classes), 1)))
    labels = np.asarray(sample_classes)
    for name, axes in zip(classes, all_axes, strict=True):
        own = weights[labels == name]  # (S_class, n)
        image = axes.imshow(own.T, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        style(axes, f"{name} data, {len(own)} held-out samples")
        axes.set_yticks(range(n), specialists, fontsize=9, color=INK)
        axes.set_yticks(np.arange(0.5, n - 1), minor=True)
        axes.grid(visible=False)
        axes.grid(visible=True, which="minor", axis="y", color="white", linewidth=2)
        axes.tick_params(which="both", length=0)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        means = own.mean(axis=0)  # (n,)
        axes.annotate(
            "per sample",
            (1.008, 1.0),
            xycoords="axes fraction",
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
        )
        for row, mean in enumerate(means):
            axes.text(
                1.008,
                row,
                f"{mean:.2f}",
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=9,
                color=INK,
                fontweight="bold" if mean == means.max() else "normal",
            )
    bar = figure.colorbar(image, ax=all_axes, fraction=0.025, pad=0.012, aspect=28)
    bar.set_label("gate weight per sample", fontsize=9, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    bar.outline.set_visible(False)
    return save(figure, path)


def plot_comparison(path: str | Path, runs: Mapping[str, tuple[Sequence[StepRecord], Sequence[EvalRecord]]]) -> Path:
    """Runs in one colour each: training loss and speed over the steps (moving averages), held-out loss of the fused
    model (mean over the classes).

    Args:
        path: of the PNG.
        runs: name -> its steps, at least one, and evaluations.
    """
    figure, (training, held_out, speed) = panels_of(1, 3, height_in=3.2)
    for axes, title in ((training, "training loss"), (held_out, "held-out loss, fused"), (speed, "response tokens/s")):
        style(axes, title)
        axes.set_xlabel("step", fontsize=9, color=MUTED)
    averages, colors = [], {name: COLORS[place % len(COLORS)] for place, name in enumerate(runs)}
    for name, (steps, evals) in runs.items():
        x, window = [record.step for record in steps], max(1, len(steps) // 25)
        averages.append(moving_average(np.array([record.loss for record in steps], dtype=float), window))
        rates = moving_average(np.array([record.tokens_per_s for record in steps], dtype=float), window)
        points = [(record.step, record.mean[FUSED]) for record in evals if FUSED in record.mean]
        training.plot(x, averages[-1], color=colors[name], linewidth=1.6)
        places, losses = [step for step, _ in points], [loss for _, loss in points]
        held_out.plot(places, losses, "o-", color=colors[name], linewidth=1.2, markersize=4)
        speed.plot(x, rates, color=colors[name], linewidth=1.6)
    training.set_ylim(*_limits(averages))
    speed.set_ylim(bottom=0)
    legend(figure, [Line2D([], [], color=color, linewidth=1.8, label=name) for name, color in colors.items()])
    return save(figure, path)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` values around every place (fewer at the ends), (S,) -> (S,); nan is left out."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])  # (S + 1,)
    count = np.concatenate([[0], np.cumsum(finite)])  # (S + 1,)
    place = np.arange(len(values))
    start = np.maximum(place - window // 2, 0)
    end = np.minimum(place - window // 2 + window, len(values))
    kept = count[end] - count[start]
    return np.divide(total[end] - total[start], kept, out=np.full(len(values), np.nan), where=kept > 0)


def _need_steps(caller: str, steps: Sequence[StepRecord]) -> None:
    if not steps:
        raise InputError(f"{caller}: no step record to draw; train for at least one step")


def _class_names(mappings: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _best_specialist(evals: Sequence[EvalRecord], class_name: str) -> tuple[str, float] | None:
    """The specialist with the lowest loss on a class, from the first record that evaluated specialists."""
    for record in evals:
        losses = record.loss.get(class_name, {})
        alone = {model: loss for model, loss in losses.items() if model != FUSED and math.isfinite(loss)}
        if alone:
            return min(alone.items(), key=lambda item: item[1])
    return None


def _limits(series: Sequence[np.ndarray]) -> tuple[float, float]:
    """A range that holds every series with some room; single raw spikes of the training loss may leave it."""
    values = np.concatenate(series)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    room = 0.08 * (values.max() - values.min()) or 0.1
    return float(values.min() - room), float(values.max() + room)


def _panels(names: Sequence[str], height_in: float) -> tuple[Figure, dict[str, Axes]]:
    columns = min(_PANELS_PER_ROW, len(names))
    rows = math.ceil(len(names) / columns)
    figure, grid = panels_of(rows, columns, height_in)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    panels = dict(zip(names, grid, strict=False))
    for name, axes in panels.items():
        style(axes, f"{name} data")
    return figure, panels


def _mark_stages(axes: Axes, steps: Sequence[StepRecord]) -> None:
    """A vertical line between the stages, named at the top wherever there is room for the name."""
    first, last = steps[0].step, steps[-1].step
    for before, after in pairwise(steps):
        if before.stage == after.stage:
            continue
        axes.axvline(after.step - 0.5, color=MUTED, linewidth=1.0, linestyle=":")
        done = (after.step - first) / max(last - first, 1)
        for stage, room, side, shift in ((before.stage, done, "right", -4), (after.stage, 1 - done, "left", 4)):
            if room > 0.17:
                axes.annotate(
                    f"stage {stage}",
                    (after.step - 0.5, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(shift, -2),
                    textcoords="offset points",
                    ha=side,
                    va="top",
                    fontsize=8,
                    color=MUTED,
                )


def _label_edges(panels: Mapping[str, Axes], x: str, y: str) -> None:
    for index, axes in enumerate(panels.values()):
        if index % _PANELS_PER_ROW == 0:
            axes.set_ylabel(y, fontsize=9, color=MUTED)
        if index + _PANELS_PER_ROW >= len(panels):
            axes.set_xlabel(x, fontsize=9, color=MUTED)
