"""The plots of an evaluation: the right numbers in them, and a refusal where there is nothing to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting import evaluation_plots
from ultrafuser_mega.reporting.evaluation_plots import plot_bars, plot_lines, plot_radar

SCORES = {
    "text": {"TruthfulQA": (50.0, 45.0, 56.0), "GSM8K": (10.0, 7.0, 14.0), "AQuA": (20.0, 15.0, 26.0)},
    "fused": {"TruthfulQA": (40.0, 36.0, 45.0), "GSM8K": (40.0, 33.0, 46.0)},
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved during the test."""
    saved: list[Figure] = []
    save = evaluation_plots.save

    def save_and_keep(figure: Any, path: Any) -> Any:
        saved.append(figure)
        return save(figure, path)

    monkeypatch.setattr(evaluation_plots, "save", save_and_keep)
    return saved


def heights(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata(), dtype=float).tolist()


def test_bars_have_the_scores_as_heights(tmp_path: Path, figures: list[Figure]) -> None:
    path = plot_bars(tmp_path / "plots" / "scores.png", SCORES)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == [50.0, 10.0, 20.0, 40.0, 40.0]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["TruthfulQA", "GSM8K", "AQuA"]


def test_lines_have_a_panel_each_and_leave_out_what_is_missing(tmp_path: Path, figures: list[Figure]) -> None:
    plot_lines(tmp_path / "lines.png", {"one": SCORES, "two": SCORES})
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["one", "two"]
    drawn = [heights(line) for line in figures[0].axes[1].lines if line.get_linestyle() == "-"]
    assert drawn == [[50.0, 10.0, 20.0], [40.0, 40.0]]


def test_a_radar_reaches_its_rim_where_a_model_is_the_best(tmp_path: Path, figures: list[Figure]) -> None:
    plot_radar(tmp_path / "radar.png", {"all": SCORES})
    text, fused = (heights(line) for line in figures[0].axes[0].lines)
    assert text == [1.0, 0.25, 1.0, 1.0] and fused == [0.8, 1.0, 0.0, 0.8]


def test_without_scores_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plot_bars: no score to draw"):
        plot_bars(tmp_path / "x.png", {"m": {}})
    with pytest.raises(InputError, match="plot_radar: two has 2 axes; a radar needs three"):
        plot_radar(tmp_path / "x.png", {"two": {"m": {"a": (1, 1, 1), "b": (1, 1, 1)}}})
    assert not list(tmp_path.iterdir())
