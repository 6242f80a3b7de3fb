"""From training to a folder that others load: train, export, compare, on the command line as people do it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import write_family
from safetensors.torch import load_file
from trio import DISJOINT_8, ONE, PIECES, config_tree, train

from ultrafuser_mega.cli import main
from ultrafuser_mega.convert.restore import TrainedModel
from ultrafuser_mega.training.checkpoint import Progress, list_checkpoints

LAST = Progress(2, 3)
GATE = TrainedModel.gate


def ultrafuser(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["ultrafuser", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def short_run(trio: Path, runs: Path, layout: dict[str, Any]) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout) | {"micro_batch_size": 2}
    tree["stage1"] |= {"steps": 2}
    tree["stage2"] |= {"steps": LAST.step}
    tree["evaluation"] = {"samples_per_class": 3, "token_views": 0}
    return tree


@pytest.fixture(scope="module")
def checkpoint(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run on eight ranks; read only."""
    run = train(short_run(trio, tmp_path_factory.mktemp("runs"), DISJOINT_8), 8)
    progress, path = list_checkpoints(run / "checkpoints")[-1]
    assert progress == LAST
    return path


def test_fused_release_equals_its_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ultrafuser(monkeypatch, "export", checkpoint, tmp_path / "release") == 0
    verified, wrote = capsys.readouterr().out.splitlines()
    assert verified.startswith("verified on a text of ") and wrote == f"wrote {tmp_path / 'release'}"
    assert ultrafuser(monkeypatch, "verify", tmp_path / "release", checkpoint) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["equal"]
    assert [batch["shape"][-1] for batch in result["batches"]] == [PIECES, PIECES]
    tensors = load_file(tmp_path / "release" / "model.safetensors")
    assert tensors["specialists.code.lm_head.weight"].shape[0] == PIECES + 16  # cropped rows are back
    assert tensors["gate.w1.shared"].shape == (64, 64)  # without the units that pad it to six ranks
    assert "text" in (tmp_path / "release" / "README.md").read_text()


@pytest.mark.parametrize("name", ["text", "code", "math"])
def test_trained_specialist_leaves_with_its_own_names_and_rows(
    trio: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    out = tmp_path / name
    assert ultrafuser(monkeypatch, "export", checkpoint, out, "--what", f"specialist:{name}") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (trio / name, out))
    assert {key: t.shape for key, t in after.items()} == {key: t.shape for key, t in before.items()}
    assert not torch.equal(after["lm_head.weight"][:PIECES], before["lm_head.weight"][:PIECES])  # it was trained
    assert torch.equal(after["lm_head.weight"][PIECES:], before["lm_head.weight"][PIECES:])  # these cannot be
    assert (out / "config.json").read_bytes() == (trio / name / "config.json").read_bytes()
    capsys.readouterr()
    assert ultrafuser(monkeypatch, "verify", out, f"{checkpoint}@specialist:{name}") == 0
    assert json.loads(capsys.readouterr().out)["equal"]
    assert ultrafuser(monkeypatch, "verify", out, trio / name) == 1  # no longer what it was


def test_release_with_a_wrong_gate_is_found_by_the_export_itself(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TrainedModel, "gate", lambda self, *wanted: -GATE(self, *wanted))
    assert ultrafuser(monkeypatch, "export", checkpoint, tmp_path / "release") == 1
    printed = capsys.readouterr()
    assert "wrote" not in printed.out
    error = printed.err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / '.release.partial'}: computes something else than {checkpoint} on a ")
    assert [path.name for path in tmp_path.iterdir()] == [".release.partial"]
    assert ultrafuser(monkeypatch, "export", checkpoint, tmp_path / "release", "--resume", "--no-verify") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'release'}\n"


def test_imported_configuration_is_released_as_it_is(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = short_run(trio, tmp_path / "runs", ONE)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    start = tmp_path / "start"
    assert ultrafuser(monkeypatch, "import", tmp_path / "run.yaml", start) == 0
    assert ultrafuser(monkeypatch, "export", start, tmp_path / "release") == 0
    specialist = f"{tmp_path / 'release'}@specialist:code"
    assert ultrafuser(monkeypatch, "verify", specialist, trio / "code") == 0


def test_single_folder_goes_in_and_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_family(tmp_path / "source", "qwen2_tied", dtype=torch.bfloat16)
    assert ultrafuser(monkeypatch, "import", source, tmp_path / "checkpoint", "--dtype", "fp32") == 0
    assert "output head tied to the embedding; the checkpoint holds both" in capsys.readouterr().out
    arguments = ("export", tmp_path / "checkpoint", tmp_path / "out", "--what", "specialist:specialist")
    assert ultrafuser(monkeypatch, *arguments) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert ultrafuser(monkeypatch, *arguments) == 2
    assert "out: exists already" in capsys.readouterr().err
