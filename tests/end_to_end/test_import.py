"""What ``ultrafuser import`` refuses, and what it hands to the import: on the command line, nothing is imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.command import ultrafuser
from support.trio import ONE, config_tree

from ultrafuser_mega.convert import importer


@pytest.fixture
def config(trio: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config_tree(trio, tmp_path / "runs", ONE), sort_keys=False))
    return path


def test_overrides_change_the_configuration_and_the_line_that_trains_from_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[importer.ImportPlan] = []
    monkeypatch.setattr(importer, "import_specialists", lambda plan, out: plans.append(plan))
    changes = ("gate.hidden_size=24", "vocab_size=300")
    assert ultrafuser(monkeypatch, "import", config, tmp_path / "start", *changes) == 0
    assert (plans[0].gate_units, plans[0].vocab_size) == (24, 300)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"train from it: ultrafuser train --config {config} gate.hidden_size=24 vocab_size=300 "
        f"checkpoint.start={tmp_path / 'start'}"
    )


def test_overrides_of_a_folder_and_checkpoints_as_sources_are_refused(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ultrafuser(monkeypatch, "import", trio / "text", tmp_path / "start", "seed=3") == 2
    assert "error: seed=3: overrides belong to a configuration" in capsys.readouterr().err
    done = tmp_path / "run" / "checkpoints" / "stage1-step0000002"
    done.mkdir(parents=True)
    (done / "progress.json").write_text("{}")
    assert ultrafuser(monkeypatch, "import", tmp_path / "run", tmp_path / "start") == 2
    assert f"is a checkpoint already; a run begins with it by checkpoint.start={tmp_path / 'run'}" in (
        capsys.readouterr().err
    )
