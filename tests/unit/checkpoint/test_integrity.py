"""One process compares a checkpoint's files as a job's ranks do."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ultrafuser_mega.checkpoint.checkpoint import noted_bytes, verify_checkpoint_here
from ultrafuser_mega.errors import InputError

FILES = {"__0_0.distcp": b"weights", ".metadata": b"", "sources/text/config.json": b"{}"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "stage1-step0000002"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = {name: {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"} for name, data in FILES.items()}
    record = {"progress": {"stage": 1, "step": 2}, "identity": {}, "files": files}
    (folder / "progress.json").write_text(json.dumps(record))
    return folder


def test_all_that_was_noted_is_read_and_told(checkpoint: Path) -> None:
    read: list[int] = []
    verify_checkpoint_here(checkpoint, read.append)
    assert sum(read) == noted_bytes(checkpoint) == 9


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(b"weight"), "damaged: 6 bytes there, 7 were written"),
        (lambda path: path.write_bytes(b"weighty"), r"damaged: its checksum is \w{8}, \w{8} was written"),
    ],
    ids=["missing", "cut", "changed"],
)
def test_damage_is_named_with_what_to_do(checkpoint: Path, damage: Callable[[Path], object], says: str) -> None:
    path = checkpoint / "__0_0.distcp"
    damage(path)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {says}; copy the checkpoint again, or remove "):
        verify_checkpoint_here(checkpoint, lambda size: None)


def test_a_checkpoint_that_notes_nothing_passes(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "progress.json").read_text())
    del record["files"]
    (checkpoint / "progress.json").write_text(json.dumps(record))
    (checkpoint / "__0_0.distcp").unlink()
    verify_checkpoint_here(checkpoint, lambda size: None)
    assert noted_bytes(checkpoint) == 0
