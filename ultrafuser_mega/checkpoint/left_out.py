"""What a small checkpoint leaves out: weights that a run does not change, which stay in the specialists' folders.

Under ``checkpoint.weights: trained`` it holds the gate, adapters, what trains in full, and ``left_out.json``: where the
other weights are, with each weight file's size and a checksum of samples all over it. Whoever reads the checkpoint
takes them from there, and is told where the folder holds other ones.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ultrafuser_mega.config import HEADS, FuserConfig
from ultrafuser_mega.errors import InputError

LEFT_OUT = "left_out.json"
_SAMPLES, _SAMPLE_BYTES = 512, 4096  # of a file, evenly over it


def changing(config: FuserConfig) -> frozenset[str]:
    """Parts whose own weights some stage of the run trains, adapters beside."""
    parts = [part for number in config.stages for part in config.parts(number).values()]
    return frozenset(part.name for part in parts if part.mode == "full")


def is_kept(key: str, changing: frozenset[str]) -> bool:
    """Whether a small checkpoint holds the tensor ``key`` (see ``chunks``)."""
    kind, _, rest = key.partition(".")
    if kind in ("heads", "tails"):
        return HEADS in changing
    return kind != "specialists" or ".adapters." in key or rest.partition(".")[0] in changing


def record_of(config: FuserConfig) -> bytes:
    """The content of ``left_out.json``, of a run under ``config``."""
    record = {
        name: {"folder": str(folder.resolve()), "files": _fingerprints(folder)}
        for name, folder in config.folders.items()
    }
    return json.dumps(record, indent=1).encode()


def weights_beside(
    checkpoint: Path, names: Iterable[str], folders: Mapping[str, Path] | None = None
) -> dict[str, Path]:
    """Specialist -> the folder that holds what the checkpoint leaves out, of ``names``; nothing where it is complete.

    Args:
        checkpoint: a complete one.
        names: of specialists.
        folders: where a run that goes on has them now; None: where they were.

    Raises:
        InputError: a folder is not there, or holds other weights.
    """
    path = checkpoint / LEFT_OUT
    if not path.is_file():
        return {}
    try:
        record: Mapping[str, Any] = json.loads(path.read_text())
        found = {
            name: (Path((folders or {}).get(name, record[name]["folder"])), dict(record[name]["files"]))
            for name in names
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); copy the checkpoint again") from None
    for name, (folder, files) in found.items():
        if not folder.is_dir():
            raise InputError(f"{checkpoint}: leaves out weights of {name} that were in {folder}; no such folder")
        now = _fingerprints(folder)
        if now != files:
            other = next(file for file in sorted({*now, *files}) if now.get(file) != files.get(file))
            raise InputError(
                f"{checkpoint}: leaves out weights of {name}, whose file {folder / other} is not what it was; "
                "give back the one that the run had"
            )
    return {name: folder for name, (folder, _) in found.items()}


def _fingerprints(folder: Path) -> dict[str, str]:
    return {path.name: _fingerprint(path) for path in sorted(folder.glob("*.safetensors"))}


def _fingerprint(path: Path) -> str:
    """Size and a CRC-32 of samples; of the whole where that is no more."""
    size, value = path.stat().st_size, 0
    with path.open("rb") as file:
        for at in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
            file.seek(at)
            value = zlib.crc32(file.read(_SAMPLE_BYTES), value)
    return f"{size}-{value:08x}"
