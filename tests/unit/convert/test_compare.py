"""Comparing two models: equal ones agree, a changed one shows, and unlike ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import write_family

from ultrafuser_mega.convert.compare import ModelAddress, compare
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_folders
from ultrafuser_mega.errors import InputError

TEXT = "def add(a, b): return a + b"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, a checkpoint of both, and the export of one; read only."""
    root = tmp_path_factory.mktemp("models")
    folders = {"wide": write_family(root / "wide", "codellama"), "tied": write_family(root / "tied", "qwen2_tied")}
    import_specialists(plan_folders(folders, None), root / "checkpoint")
    export(root / "checkpoint", root / "out", "specialist:wide", verify=False)
    return root


@pytest.mark.parametrize("name", ["wide", "tied"])
def test_checkpoint_equals_the_folder_it_came_from(models: Path, name: str) -> None:
    """One has rows beyond the shared vocabulary, the other a head tied to its embedding."""
    result = compare(f"{models / 'checkpoint'}@specialist:{name}", str(models / name), TEXT)
    assert result.equal
    assert [agreement.what for agreement in result.batches] == ["random", "real"]
    assert all(agreement.top1 == 1.0 for agreement in result.batches)
    assert json.loads(result.to_json())["equal"] is True


def test_export_equals_its_source(models: Path) -> None:
    result = compare(str(models / "out"), str(models / "wide"), TEXT, 0.0)
    assert result.equal  # the same tensors through the same code: no rounding to forgive


def test_changed_weight_shows(models: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(models / "wide", tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1.01
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    result = compare(str(changed), str(models / "wide"), TEXT)
    assert not result.equal
    assert all(agreement.relative > 10 * result.tolerance for agreement in result.batches)


def test_nan_is_never_equal(models: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(models / "wide", tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert not compare(str(broken), str(broken), TEXT).equal


def test_models_of_different_vocabulary_are_refused(models: Path) -> None:
    with pytest.raises(InputError, match=r"has 416 logits per token, .*tied has 401; compare like with like"):
        compare(str(models / "wide"), str(models / "tied"), TEXT)


def test_text_without_a_token_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultrafuser_mega.convert.compare.limits", lambda archs: (1, 8))  # BOS is 1
    with pytest.raises(InputError, match="--text: none of its tokens is in the vocabulary"):
        compare(str(models / "wide"), str(models / "wide"), "")


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("gone", "gone: no such folder"),
        ("checkpoint@specialist:other", "expected @fused or @specialist:NAME with one of wide, tied"),
        ("checkpoint@wide", "expected @fused or @specialist:NAME"),
        ("wide@fused", "is a Hugging Face folder, which is a single model; leave out @fused"),
    ],
)
def test_address_of_no_model_is_refused(models: Path, address: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        ModelAddress.parse(str(models / address))


def test_a_runs_folder_stands_for_its_newest_checkpoint(models: Path, tmp_path: Path) -> None:
    newest = tmp_path / "run" / "checkpoints" / "stage1-step0000000"
    shutil.copytree(models / "checkpoint", newest)
    for address, part in (
        ("run@specialist:wide", "wide"),
        ("run/checkpoints@specialist:tied", "tied"),
        ("run", "fused"),
    ):
        assert ModelAddress.parse(str(tmp_path / address)) == ModelAddress(newest, "checkpoint", part)


def test_exported_folder_with_a_flipped_byte_is_refused(models: Path, tmp_path: Path) -> None:
    flipped = Path(shutil.copytree(models / "out", tmp_path / "flipped"))
    path = flipped / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor lm_head\.weight is not the one"):
        compare(str(flipped), str(models / "wide"), TEXT)


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
def test_attention_kernels_that_a_folder_asks_for_need_not_be_installed(
    models: Path, tmp_path: Path, field: str
) -> None:
    folder = Path(shutil.copytree(models / "wide", tmp_path / "wide"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: "flash_attention_2"}))
    assert compare(str(folder), str(models / "wide"), TEXT, 0.0).equal
