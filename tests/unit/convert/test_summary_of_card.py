"""A release's tables are those of the weights that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.sources import CONFIG
from ultrafuser_mega.config import dump_config, load_config
from ultrafuser_mega.convert import export

SETTINGS = ["stage1.steps=10", "stage2.steps=20"]


@pytest.mark.parametrize(
    ("steps", "progress", "told"),
    [
        pytest.param(30, Progress(2, 20), True, id="of the end of the run"),
        pytest.param(30, Progress(2, 15), False, id="of its middle"),
        pytest.param(70, Progress(2, 20), False, id="of the end of a run that went on from there"),
    ],
)
def test_a_summary_speaks_of_the_weights_at_which_its_run_ended(
    tmp_path: Path, steps: int, progress: Progress, told: bool
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / progress.folder
    (checkpoint / CONFIG).parent.mkdir(parents=True)
    (checkpoint / CONFIG).write_text(dump_config(load_config(None, SETTINGS)))
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(None, [*SETTINGS, "stage2.steps=60"])))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": steps}))
    model: Any = SimpleNamespace(folder=checkpoint, progress=progress, fused=True, sources={})
    assert (export._card(model, "x").summary is not None) == told
