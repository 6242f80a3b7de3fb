"""Runs are compared by what their folders hold, finished or not, of this version or an earlier one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from rich.console import Console

from ultrafuser_mega.cli.report import report
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting import plots
from ultrafuser_mega.reporting.comparison import comparison_tables, read_runs
from ultrafuser_mega.reporting.records import MetricsWriter


def phases(mean: float, worst: float) -> dict[str, dict[str, float]]:
    return {"exchange": {"mean": mean, "worst": worst}}


@pytest.fixture
def runs(tmp_path: Path, step_of: Any, final: Any, with_yardsticks: Any) -> list[Path]:
    """One with all that is measured today, one that has not been evaluated and knows neither phases nor memory."""
    full, poor = tmp_path / "full", tmp_path / "poor"
    with MetricsWriter(full, resume_step=None) as writer:
        for step in range(1, 4):
            stage = 1 if step == 1 else 2
            more = {"phases": phases(0.1 * step, 0.2 * step), "mfu": 0.41, "peak_memory_bytes": 3 * 2**30}
            writer.write_step(step_of(step, stage=stage, save_seconds=[1.0, 4.0, 2.0][step - 1], **more))
        writer.write_eval(with_yardsticks)
        writer.write_eval(final)
    with MetricsWriter(poor, resume_step=None) as writer:
        writer.write_step(step_of(1, seconds=0.5))
    for folder, seed in ((full, 1), (poor, 2)):
        config = {"seed": seed, "layouts": [{"kind": "colocated", "tp": 2}], "data": {"classes": {"text": {}}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (full / "summary.json").write_text(json.dumps({"layout": "colocated", "device": "NVIDIA H100 80GB HBM3"}))
    return [full, poor]


def rows(folders: list[Path]) -> dict[str, list[str]]:
    """First cell -> the others, of all tables."""
    output = io.StringIO()
    console = Console(file=output, width=200)
    for table in comparison_tables(read_runs(folders)):
        console.print(table)
    lines = [[cell for cell in line.split("   ") if cell.strip()] for line in output.getvalue().splitlines()]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if cells}


def test_every_run_has_a_column(runs: list[Path]) -> None:
    found = rows(runs)
    assert found["held out, mean"] == ["2.5900", "-"]
    assert found["oracle per token, mean"] == ["2.3000", "-"]
    assert found["seconds per step"] == ["0.25", "0.5"]
    assert found["model FLOPs utilisation"] == ["41.0%", "-"]
    assert found["memory at the most"] == ["3.0 GiB", "-"]
    assert found["exchange"] == ["0.3 / 0.6", "-"]  # stage 2 but for its first step
    assert "skipped steps" not in found  # there was none


def test_seconds_in_saves_add_up_over_the_processes_of_a_resumed_run(runs: list[Path]) -> None:
    assert rows(runs)["seconds in saves"][0] == "6"  # 1, 4, and from 0 again 2


def test_only_settings_that_differ_are_shown(runs: list[Path]) -> None:
    config = yaml.safe_load((runs[0] / "config.yaml").read_text()) | {"lora": {"rank": 4, "dropout": None}}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config))
    found = rows(runs)
    assert found["seed"] == ["1", "2"] and found["lora.rank"] == ["4", "-"]
    assert not any(name.startswith(("layouts", "data")) for name in found)
    assert "lora.dropout" not in found  # set by neither
    assert "Configurations: what differs" not in rows(runs[:1])


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: list[Path], tmp_path: Path) -> None:
    (copy := tmp_path / "copies" / "full").parent.mkdir()
    runs[0].rename(copy)
    assert [run.name for run in read_runs([copy, copy])] == [str(copy), str(copy)]
    assert [run.name for run in read_runs([copy, runs[1]])] == ["full", "poor"]


def test_a_folder_that_is_no_run_is_named_in_one_line(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone/metrics\.jsonl: no such file; give the folder of a run"):
        read_runs([*runs, tmp_path / "gone"])
    (runs[1] / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"poor/metrics\.jsonl: holds no step yet"):
        read_runs(runs)
    (runs[0] / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"full: config\.yaml or summary\.json is damaged"):
        read_runs(runs[:1])


def test_the_command_prints_tables_and_draws_a_curve_of_each_run(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = plots.save

    def keep(figure: Figure, path: Path) -> Path:
        drawn.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    report(runs, tmp_path / "curves.png")
    assert f"curves: {tmp_path / 'curves.png'}\n" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    training, held_out, speed = drawn[0].axes
    assert [np.array(line.get_xdata()).tolist() for line in training.lines] == [[1, 2, 3], [1]]
    assert [np.array(line.get_ydata()).tolist() for line in held_out.lines] == [[pytest.approx(2.59)] * 2, []]
    assert len(speed.lines) == 2
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["full", "poor"]
