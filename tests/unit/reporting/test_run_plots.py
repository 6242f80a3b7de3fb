"""The plots: real PNGs from any number of classes and specialists, the right numbers in them, no global state."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting import plots
from ultrafuser_mega.reporting.palette import specialist_colors
from ultrafuser_mega.reporting.plots import moving_average, plot_gate_heatmap, plot_gate_over_steps, plot_losses
from ultrafuser_mega.reporting.records import EvalRecord


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figures that are saved during the test, so that it can look into them."""
    saved: list[Figure] = []
    save = plots.save

    def save_and_keep(figure: Any, path: Any) -> Any:
        saved.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save", save_and_keep)
    return saved


def _png_size(path: Any) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def _texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_loss_plot_has_a_panel_per_class_with_eval_points_best_specialist_and_stage_boundary(
    tmp_path: Path, steps: Any, after_stage1: Any, final: Any, figures: Any
) -> None:
    path = plot_losses(tmp_path / "plots" / "loss.png", steps, [after_stage1, final])
    width, height = _png_size(path)
    assert width == 1600 and 400 < height < 700
    panels = figures[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["text data", "code data", "math data"]
    assert {"text alone 2.90", "stage 1", "stage 2"} <= set(_texts(panels[0]))
    held_out = next(line for line in panels[0].lines if line.get_marker() == "o")
    assert list(held_out.get_xdata()) == [8, 12] and list(held_out.get_ydata()) == [2.80, 2.74]
    boundary = next(line for line in panels[0].lines if line.get_linestyle() == ":")
    assert boundary.get_xdata()[0] == 8.5


def test_loss_plot_works_before_any_evaluation_and_with_a_loss_that_is_not_finite(tmp_path: Path, step_of: Any) -> None:
    steps = [step_of(1), step_of(2, class_loss={"text": float("nan")}), step_of(3)]
    _png_size(plot_losses(tmp_path / "loss.png", steps, []))


def test_a_run_that_diverged_can_still_be_plotted(tmp_path: Path, step_of: Any) -> None:
    nan = float("nan")
    gate = {"text": {"text": nan, "code": nan}}
    steps = [step_of(1), step_of(2, loss=nan, class_loss={"text": nan}, gate=gate)]
    evals = [EvalRecord(stage=1, step=2, loss={"text": {"fused": nan, "text": nan}}, gate=gate)]
    _png_size(plot_losses(tmp_path / "loss.png", steps, evals))
    _png_size(plot_losses(tmp_path / "loss.png", steps[1:], evals))
    _png_size(plot_gate_over_steps(tmp_path / "gate.png", steps[1:]))
    _png_size(plot_gate_heatmap(tmp_path / "heat.png", ["text"], np.full((1, 2), nan), ["text", "code"]))


def test_gate_plot_draws_every_specialist_in_its_colour(tmp_path: Path, steps: Any, figures: Any) -> None:
    _png_size(plot_gate_over_steps(tmp_path / "gate.png", steps))
    colors = specialist_colors(["text", "code", "math"])
    for axes in figures[0].axes:
        assert set(colors.values()) <= {line.get_color() for line in axes.lines}


def test_heat_map_has_a_column_per_sample_a_row_per_specialist_and_the_mean_beside_it(
    tmp_path: Path, figures: Any
) -> None:
    classes = ["law", "chat", "law", "law", "chat"]
    weights = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.8, 0.2], [0.4, 0.6]])  # (5, 2)
    _png_size(plot_gate_heatmap(tmp_path / "heat.png", classes, weights, ["jurist", "general"]))
    law, chat = figures[0].axes[:2]
    np.testing.assert_array_equal(law.images[0].get_array(), weights[[0, 2, 3]].T)
    np.testing.assert_array_equal(chat.images[0].get_array(), weights[[1, 4]].T)
    assert law.images[0].get_clim() == (0.0, 1.0)
    assert _texts(law) == ["0.80", "0.20", "per sample"] or _texts(law) == ["per sample", "0.80", "0.20"]
    colors = law.images[0].get_cmap()(np.linspace(0, 1, 9))[:, :3]  # (9, 3)
    assert (np.diff(colors.sum(axis=1)) < 0).all()  # more weight is darker


@pytest.mark.parametrize("weights", [np.ones((2, 3)), np.ones((3, 2)), np.ones(3)])
def test_heat_map_refuses_shapes_that_do_not_fit(tmp_path: Path, weights: Any) -> None:
    with pytest.raises(InputError, match=r"plot_gate_heatmap: weights .* for \(samples, specialists\) \(3, 3\)"):
        plot_gate_heatmap(tmp_path / "heat.png", ["a", "a", "b"], weights, ["x", "y", "z"])


def test_plots_without_a_step_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plot_losses: no step record"):
        plot_losses(tmp_path / "loss.png", [], [])
    with pytest.raises(InputError, match="plot_gate_over_steps: no step record"):
        plot_gate_over_steps(tmp_path / "gate.png", [])


def test_moving_average_is_the_mean_around_every_place_and_leaves_out_nan() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0, np.nan, np.nan, np.nan])
    expected = [1.5, 1.5, 3.0, 6.5, 6.5, 9.0, np.nan, np.nan]
    np.testing.assert_allclose(moving_average(values, window=3), expected, rtol=1e-12)
    np.testing.assert_array_equal(moving_average(values, window=1), values)


def test_plotting_never_loads_pyplot() -> None:
    code = "import sys, ultrafuser_mega.reporting.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
