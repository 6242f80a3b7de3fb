"""Damaged input and interrupted exports: one line that names file and tensor, and never a half-written folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import write_family

from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_folders
from ultrafuser_mega.convert.shards import LEDGER, check_hashes
from ultrafuser_mega.errors import InputError

SHARD_BYTES = 60_000  # about eight shards


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a specialist, its checkpoint and its export; read only."""
    root = tmp_path_factory.mktemp("faults")
    write_family(root / "source", "qwen3")
    import_specialists(plan_folders({"a": root / "source"}, None), root / "checkpoint")
    export(root / "checkpoint", root / "out", "specialist:a", verify=False, shard_bytes=SHARD_BYTES)
    return root


@pytest.fixture
def copy(intact: Path, tmp_path: Path) -> Path:
    """The same to spoil."""
    return Path(shutil.copytree(intact, tmp_path / "copy"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def interrupt_after(copy: Path, shards: int) -> Path:
    """Leave what an export would leave that was killed in shard ``shards + 1``."""
    partial = copy / ".out.partial"
    (copy / "out").rename(partial)
    ledger = json.loads((partial / LEDGER).read_text())
    keep = list(ledger["shards"])[:shards]
    for path in partial.iterdir():
        if path.name not in keep:
            path.unlink()
    (partial / f"model-{shards + 1:05d}.safetensors.partial").write_bytes(b"half")
    (partial / LEDGER).write_text(json.dumps({**ledger, "shards": {name: ledger["shards"][name] for name in keep}}))
    return partial


def go_on(copy: Path) -> list[str]:
    return export(copy / "checkpoint", copy / "out", "specialist:a", resume=True, verify=False, shard_bytes=SHARD_BYTES)


def test_interrupted_export_must_be_gone_on_with_explicitly(copy: Path) -> None:
    interrupt_after(copy, 2)
    message = refusal(lambda: export(copy / "checkpoint", copy / "out", "specialist:a"))
    assert message.endswith(".out.partial: an interrupted export; go on with --resume, or remove it")
    assert not (copy / "out").exists()


def test_resumed_export_keeps_finished_shards_and_gives_identical_bytes(intact: Path, copy: Path) -> None:
    partial = interrupt_after(copy, 3)
    before = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert go_on(copy) == []
    assert bytes_of(copy / "out") == bytes_of(intact / "out")
    assert {name: (copy / "out" / name).stat().st_ino for name in before} == before  # not written again


@pytest.mark.parametrize("damage", ["flipped byte", "truncated"])
def test_damaged_finished_shard_is_written_again_with_a_notice(intact: Path, copy: Path, damage: str) -> None:
    partial = interrupt_after(copy, 3)
    shard = sorted(partial.glob("*.safetensors"))[1]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        flip(shard, -1)
    last = list(load_file(sorted((intact / "out").glob("*.safetensors"))[1]))[-1]
    (notice,) = go_on(copy)
    assert notice == f"{shard}: tensor {last} is not the one that was written; written again"
    assert bytes_of(copy / "out") == bytes_of(intact / "out")


def test_shards_of_another_checkpoint_are_not_used(intact: Path, copy: Path) -> None:
    partial = interrupt_after(copy, 3)
    ledger = json.loads((partial / LEDGER).read_text())
    (partial / LEDGER).write_text(json.dumps(ledger | {"identity": "another"}))
    for shard in partial.glob("*.safetensors"):
        flip(shard, -1)
    assert go_on(copy) == [f"{partial}: was left by the export of something else; thrown away and begun anew"]
    assert bytes_of(copy / "out") == bytes_of(intact / "out")


def test_flipped_byte_of_a_finished_folder_is_found_by_its_ledger(copy: Path) -> None:
    check_hashes(copy / "out")
    shard = sorted((copy / "out").glob("*.safetensors"))[2]
    name = list(load_file(shard))[-1]
    flip(shard, -1)
    assert refusal(lambda: check_hashes(copy / "out")) == (
        f"{shard}: tensor {name} is not the one that was written; copy the file again"
    )


def first_chunks(checkpoint: Path) -> Path:
    return min(checkpoint.glob("*.distcp"))


def no_chunks(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.distcp"):
        path.unlink()


def halve(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_weight(checkpoint: Path) -> None:
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)


def change_config(**changes: object) -> Callable[[Path], None]:
    def spoil(checkpoint: Path) -> None:
        path = checkpoint / "sources" / "a" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


def hostile_index(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload()))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(no_chunks, r"distcp: missing; it holds (specialists|heads)\.", id="chunks missing"),
        pytest.param(halve, r"distcp: damaged where it holds (specialists|heads)\.", id="chunks truncated"),
        pytest.param(
            flip_a_weight,
            r"distcp: damaged where it holds .* \(the checksum of .* is another\)",
            id="one byte of a weight",
        ),
        pytest.param(
            lambda checkpoint: (checkpoint / ".metadata").write_bytes(b"\x80"),
            r"\.metadata: damaged checkpoint index",
            id="index damaged",
        ),
        pytest.param(hostile_index, r"\.metadata: damaged checkpoint index \(posix\.mkdir has no place", id="pickle"),
        pytest.param(
            change_config(intermediate_size=128),
            r"tensor specialists\.a\.decoder\.layers\.mlp\.linear_fc[12]\.weight has shape .*config\.json calls for",
            id="config disagrees",
        ),
        pytest.param(
            change_config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
            r"tensor specialists\.a\.decoder\.layers\.\S+ has shape \(2, .*calls for \(3, ",
            id="config has more layers",
        ),
        pytest.param(
            lambda checkpoint: (checkpoint / "sources.json").unlink(), r"has no sources\.json", id="sources missing"
        ),
        pytest.param(
            lambda checkpoint: (checkpoint / "progress.json").write_text("{}"),
            r"progress\.json: damaged",
            id="progress",
        ),
    ],
)
def test_damaged_checkpoint_is_refused_by_name(
    copy: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object], named: str
) -> None:
    monkeypatch.chdir(copy)
    shutil.rmtree(copy / "out")
    spoil(copy / "checkpoint")
    with pytest.raises(InputError, match=named) as caught:
        export(copy / "checkpoint", copy / "out", "specialist:a")
    assert "\n" not in str(caught.value)
    assert not (copy / "out").exists()
    assert not (copy / "executed").exists()


def test_folder_with_pickle_weights_is_not_imported(copy: Path) -> None:
    source = copy / "source"
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert "pickle weights are not read" in refusal(lambda: plan_folders({"a": source}, None))


def test_element_type_that_is_no_float_is_refused(copy: Path) -> None:
    source = copy / "source"
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert "tensor model.norm.weight is F8_E4M3; expected fp32, bf16 or fp16 weights" in refusal(
        lambda: plan_folders({"a": source}, None)
    )
