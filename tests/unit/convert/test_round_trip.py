"""In and out again: every family comes back tensor for tensor and field for field, whatever layout wrote it.

That sharded ones also compute what transformers computes is ``tests/distributed/test_families.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILY_CASES, write_family

from ultrafuser_mega.checkpoint import tensors as stored
from ultrafuser_mega.convert import restore
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_folders
from ultrafuser_mega.convert.restore import TrainedModel
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.layout import plan_colocated, plan_disjoint

# bf16 and fp32 in turn: what came as bf16 must leave as bf16 though the checkpoint beside an fp32 model is fp32.
DTYPES = {case: (torch.bfloat16, torch.float32)[i % 2] for i, case in enumerate(FAMILY_CASES)}

SLOW_SIZES = ((2, 2), (4, 1), (4, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per family case; read only."""
    root = tmp_path_factory.mktemp("families")
    return {case: write_family(root / case, case, dtype=DTYPES[case]) for case in FAMILY_CASES}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_folder(out: Path, source: Path) -> None:
    """Equal tensors under equal names and types; every other file byte for byte."""
    ours, theirs = tensors_of(out), tensors_of(source)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_all_families_come_back_from_a_colocated_checkpoint(
    folders: dict[str, Path], tmp_path: Path, tp: int, pp: int
) -> None:
    plan = plan_folders(folders, None)
    assert plan.dtype == torch.float32  # the smallest that holds bf16 and fp32
    import_specialists(plan, tmp_path / "checkpoint", plan_colocated(list(folders), tp, pp, dp=1))
    for case, source in folders.items():
        export(tmp_path / "checkpoint", tmp_path / case, f"specialist:{case}", verify=False)
        assert_same_folder(tmp_path / case, source)


@pytest.mark.parametrize(
    ("tp", "pp"), [(1, 1), (1, 2), (2, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in SLOW_SIZES)]
)
def test_all_families_come_back_from_disjoint_checkpoints(
    folders: dict[str, Path], tmp_path: Path, tp: int, pp: int
) -> None:
    """As many beside each other as eight ranks take, and one of another tp: their heads lie on all last stages.

    Four ranks and more to a family need a job for every one or two; the colocated checkpoints above have these sizes
    for all families in one.
    """
    cases = list(folders)
    at_once = 8 // (tp * pp)
    for start in range(0, len(cases), at_once):
        chosen = cases[start : start + at_once]
        layout = plan_disjoint(dict.fromkeys(chosen, (tp, pp, None)) | {"beside": (1, 1, None)}, dp=1)
        sources = {case: folders[case] for case in chosen} | {"beside": folders["llama"]}
        checkpoint = tmp_path / f"checkpoint{start}"
        import_specialists(plan_folders(sources, None), checkpoint, layout)
        for case in chosen:
            export(checkpoint, tmp_path / case, f"specialist:{case}", verify=False)
            assert_same_folder(tmp_path / case, folders[case])


def test_reading_in_pieces_of_any_size_gives_the_same_tensors(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one row of 256 bytes and less than a row of 384; blocks of the vocabulary across shards and tails."""
    monkeypatch.setattr(stored, "_READ_AT_ONCE", 300)
    monkeypatch.setattr(restore, "_ROWS_AT_ONCE", 7)
    chosen = {case: folders[case] for case in ("llama_llama3", "codellama")}
    import_specialists(plan_folders(chosen, None), tmp_path / "checkpoint", plan_colocated(list(chosen), 2, 2, dp=1))
    for case, source in chosen.items():
        export(tmp_path / "checkpoint", tmp_path / case, f"specialist:{case}", verify=False)
        assert_same_folder(tmp_path / case, source)


def test_shards_and_their_index_hold_every_tensor_once(folders: dict[str, Path], tmp_path: Path) -> None:
    import_specialists(plan_folders({"a": folders["qwen3"]}, None), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", "specialist:a", verify=False, shard_bytes=60_000)
    assert_same_folder(tmp_path / "out", folders["qwen3"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == held
    assert len(set(held.values())) > 2
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in (tmp_path / "out").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_head_that_a_tied_folder_stores_too_comes_back_stored(folders: dict[str, Path], tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", "qwen2_tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_specialists(plan_folders({"a": source}, None), tmp_path / "checkpoint")
    assert export(tmp_path / "checkpoint", tmp_path / "out", "specialist:a", verify=False) == []
    assert_same_folder(tmp_path / "out", source)


def test_head_that_training_moved_away_from_its_embedding_is_untied_with_a_notice(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_specialists(plan_folders({"a": folders["qwen2_tied"]}, None), tmp_path / "checkpoint")
    from ultrafuser_mega.convert.restore import RestoredSpecialist

    whole = RestoredSpecialist._head
    monkeypatch.setattr(RestoredSpecialist, "_head", lambda self, rows: whole(self, rows) + 1)
    (notice,) = export(tmp_path / "checkpoint", tmp_path / "out", "specialist:a", verify=False)
    assert notice.startswith("a: its folder tied the output head")
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", folders["qwen2_tied"]))
    assert config == before | {"tie_word_embeddings": False}
    tensors = tensors_of(tmp_path / "out")
    assert torch.equal(tensors["lm_head.weight"], (tensors["model.embed_tokens.weight"] + 1))


def test_what_cannot_be_exported_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    import_specialists(plan_folders({"a": folders["llama"]}, None), tmp_path / "checkpoint")
    assert list(TrainedModel(tmp_path / "checkpoint").sources) == ["a"]
    (tmp_path / "there").mkdir()
    for arguments, named in (
        ((tmp_path / "gone", tmp_path / "out", "fused"), "gone: no such folder"),
        ((tmp_path / "checkpoint", tmp_path / "there", "specialist:a"), "there: exists already"),
        ((tmp_path / "checkpoint", tmp_path / "out", "specialist:b"), "--what specialist:b: .* holds a"),
        (
            (tmp_path / "checkpoint", tmp_path / "out", "all"),
            "--what all: expected fused, specialist:NAME or adapter:NAME with one of a",
        ),
        ((tmp_path / "checkpoint", tmp_path / "out", "fused"), "not from a configuration of a run"),
    ):
        with pytest.raises(InputError, match=named):
            export(*arguments)
    with pytest.raises(InputError, match="checkpoint: exists already"):
        import_specialists(plan_folders({"a": folders["llama"]}, None), tmp_path / "checkpoint")
