"""Safetensors written tensor by tensor, in shards that an interrupted export can go on from.

A shard's header follows from names, shapes and element types alone, so it is written first and every tensor behind it
as it comes: never is more than one tensor in memory. ``export.json`` in the same folder keeps the SHA-256 of every
finished shard's tensors; on going on, and by ``check_hashes`` at any later time, they are compared with the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError

LEDGER = "export.json"
SHARD_BYTES = 5 * 10**9
_READ_AT_ONCE = 1 << 24
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in order, each with its place behind the header."""

    file: str
    tensors: dict[str, Planned]

    def header(self) -> bytes:
        """Length and JSON header, padded to a multiple of 8 as safetensors wants it."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, planned in self.tensors.items():
            code = _CODES.get(planned.dtype)
            if code is None:
                raise InputError(f"{name}: element type {planned.dtype} is not written; use fp32, fp16 or bf16 weights")
            entries[name] = {"dtype": code, "shape": list(planned.shape), "data_offsets": [start, start + planned.size]}
            start += planned.size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(tensors: Mapping[str, Planned], shard_bytes: int) -> list[Shard]:
    """Tensors in their order, a new file before one would exceed ``shard_bytes``; one tensor always fits."""
    parts: list[dict[str, Planned]] = [{}]
    size = 0
    for name, planned in tensors.items():
        if parts[-1] and size + planned.size > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = planned
        size += planned.size
    if len(parts) == 1:
        return [Shard("model.safetensors", parts[0])]
    return [Shard(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part) for i, part in enumerate(parts, 1)]


def write_shards(
    folder: Path, tensors: Mapping[str, Planned], read: Callable[[str], Tensor], identity: str, shard_bytes: int
) -> list[str]:
    """Write into ``folder`` what is not there yet, the index last.

    Args:
        folder: exists; may hold shards and the ledger of an interrupted call.
        tensors: what to write, in order.
        read: name -> tensor, as planned.
        identity: of what is exported; finished shards of another export are not used.
        shard_bytes: largest size of a file's tensors.

    Returns:
        Notices: shards that were finished before but are damaged, and were written again.
    """
    shards = plan_shards(tensors, shard_bytes)
    ledger = _read_ledger(folder)
    done = ledger["shards"] if ledger.get("identity") == identity else {}
    notices = []
    finished: dict[str, dict[str, str]] = {}
    for shard in shards:
        if shard.file in done:
            problem = _problem(folder / shard.file, done[shard.file], shard.header())
            if problem is None:
                finished[shard.file] = done[shard.file]
                continue
            notices.append(f"{problem}; written again")
        finished[shard.file] = _write(folder / shard.file, shard, read)
        _replace(folder / LEDGER, json.dumps({"identity": identity, "shards": finished}, indent=1))
    for path in folder.glob("*.safetensors*"):
        if path.name not in finished:  # of another plan
            path.unlink()
    _replace(folder / LEDGER, json.dumps({"identity": identity, "shards": finished}, indent=1))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(planned.size for planned in tensors.values())},
            "weight_map": {name: shard.file for shard in shards for name in shard.tensors},
        }
        _replace(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return notices


def begin_ledger(folder: Path, identity: str) -> bool:
    """Note in ``folder`` whose shards it is going to hold, unless that is noted already.

    Returns:
        Whether it is ``identity`` that is noted now, or another.

    Raises:
        InputError: there are files, but nothing says of what export.
    """
    if (folder / LEDGER).is_file():
        return _read_ledger(folder)["identity"] == identity
    if any(path.suffix != ".partial" for path in folder.iterdir()):
        raise InputError(f"{folder}: is no interrupted export (no {LEDGER}); remove it")
    _replace(folder / LEDGER, json.dumps({"identity": identity, "shards": {}}, indent=1))
    return True


def check_hashes(folder: Path) -> None:
    """Compare the safetensors of an exported folder with its ledger; without a ledger there is nothing to compare.

    Raises:
        InputError: names the file and the first tensor whose bytes are not those that were written.
    """
    for file, hashes in _read_ledger(folder)["shards"].items():
        if (problem := _problem(folder / file, hashes, None)) is not None:
            raise InputError(f"{problem}; copy the file again")


def _write(path: Path, shard: Shard, read: Callable[[str], Tensor]) -> dict[str, str]:
    partial = path.with_name(f"{path.name}.partial")
    hashes = {}
    with partial.open("wb") as file:
        file.write(shard.header())
        for name, planned in shard.tensors.items():
            tensor = read(name)
            if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
                raise RuntimeError(f"{name}: planned {planned}, read {tensor.dtype} {tuple(tensor.shape)}")
            # Little-endian machines only, as everywhere in torch's and safetensors' world.
            data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            hashes[name] = hashlib.sha256(data).hexdigest()
            file.write(data)
            del tensor, data
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return hashes


def _problem(path: Path, hashes: Mapping[str, str], header: bytes | None) -> str | None:
    """What is wrong with a finished shard, in words; None if it is as it was written."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            text = file.read(int.from_bytes(start, "little")) if len(start) == 8 else b""
            if header is not None and start + text != header:
                return f"{path}: the header is not the one that was written"
            entries = json.loads(text)
            base = 8 + len(text)
            for name, expected in hashes.items():
                begin, end = entries[name]["data_offsets"]
                digest = hashlib.sha256()
                file.seek(base + begin)
                for part in _parts(file, end - begin):
                    digest.update(part)
                if digest.hexdigest() != expected:
                    return f"{path}: tensor {name} is not the one that was written"
            if path.stat().st_size != base + max(entry["data_offsets"][1] for entry in _tensors(entries)):
                return f"{path}: has {path.stat().st_size} bytes, its tensors end elsewhere"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return f"{path}: truncated or damaged header"
    return None


def _tensors(entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for name, entry in entries.items() if name != "__metadata__"]


def _parts(file: Any, size: int) -> Iterator[bytes]:
    while size > 0 and (part := file.read(min(size, _READ_AT_ONCE))):
        size -= len(part)
        yield part


def _read_ledger(folder: Path) -> dict[str, Any]:
    path = folder / LEDGER
    if not path.is_file():
        return {"shards": {}}
    try:
        ledger = json.loads(path.read_text())
        return {"identity": ledger["identity"], "shards": dict(ledger["shards"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged ledger of an export; remove {folder} and export again") from None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
