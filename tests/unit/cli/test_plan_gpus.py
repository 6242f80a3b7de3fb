"""``ultrafuser plan --gpus``, over folders that hold a config.json and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command import ultrafuser
from support.trio import ONE, config_tree

from ultrafuser_mega.config import load_config
from ultrafuser_mega.planning.preflight import plan_layouts

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a run whose folders hold their config.json alone; no data file is there."""
    for name in ("text", "code", "math"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
    tree: dict[str, Any] = config_tree(tmp_path, tmp_path / "runs", ONE)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_config_json_is_enough_and_the_entry_can_be_pasted(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ultrafuser(monkeypatch, "plan", "--config", config, "--gpus", 4) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "4 x h100-80g, 8 to a node" in printed
    assert "not checked: weights, tokenizers, data" in printed
    assert "4 GPUs are too many for this batch" in printed  # the toy's: the host is what takes time
    table = lines[: next(at for at, line in enumerate(lines) if line.startswith("stage 2: "))]
    assert max(map(len, table)) <= 120
    start = next(at for at, line in enumerate(lines) if line.startswith("layouts:"))
    entry = yaml.safe_load("\n".join(lines[start : start + 2]))
    tree = yaml.safe_load(config.read_text()) | entry
    config.write_text(yaml.safe_dump(tree))
    assert [layout.world_size for layout in plan_layouts(load_config(config))] == [4]


@pytest.mark.parametrize("other", [["--ranks", "2"], ["--resume"], ["--dry-run"]])
def test_options_that_mean_nothing_beside_it_are_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: list[str]
) -> None:
    assert ultrafuser(monkeypatch, "plan", "--config", config, "--gpus", 4, *other) == 2
    assert (
        "error: --gpus: tries layouts of its own; leave --ranks, --resume and --dry-run out" in capsys.readouterr().err
    )


def test_gpus_that_are_not_known_are_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ultrafuser(monkeypatch, "plan", "--config", config, "--gpus", 4, "--gpu", "rtx-4090") == 2
    assert "--gpu rtx-4090: not known; one of" in capsys.readouterr().err
