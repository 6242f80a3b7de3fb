"""Size and checksum of every file of a checkpoint: noted when it is written, compared before it is read.

A rank sums up what it writes while it writes (``writer``); what is small and rank 0's is read for it. On reading the
files are dealt over the ranks, however many there are now. CRC-32 finds damage, not forgery.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

#: file, relative to the checkpoint -> {"bytes": its size, "crc32": its checksum as 8 hexadecimal digits}
FileRecords = dict[str, dict[str, Any]]
#: told the bytes of a piece of a file that was read
HaveRead = Callable[[int], object]

_READ_AT_ONCE = 1 << 24


def record_files(folder: Path) -> FileRecords:
    """Size and checksum of every file under ``folder``, which are read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _record(path) for path in files}


def damage_of(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Compare the files of ``folder`` with what was noted of them; collective over the job.

    Args:
        folder: a checkpoint.
        files: as they were noted.

    Returns:
        Which file is missing or not what was written, and how; the same one on every rank; None if all are.
    """
    problem = None
    for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
        if problem := _problem(folder / name, files[name]):
            break
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def damage_of_here(folder: Path, files: Mapping[str, Mapping[str, Any]], have_read: HaveRead) -> str | None:
    """The same as :func:`damage_of` by one process, without a job."""
    problems = (_problem(folder / name, files[name], have_read) for name in sorted(files))
    return next(filter(None, problems), None)


def _problem(path: Path, noted: Mapping[str, Any], have_read: HaveRead | None = None) -> str | None:
    try:
        if (size := path.stat().st_size) != noted["bytes"]:
            return f"{path}: damaged: {size} bytes there, {noted['bytes']} were written"
        if (checksum := _checksum(path, have_read)) != noted["crc32"]:
            return f"{path}: damaged: its checksum is {checksum}, {noted['crc32']} was written"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def _record(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "crc32": _checksum(path)}


def _checksum(path: Path, have_read: HaveRead | None = None) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            value = zlib.crc32(block, value)
            if have_read is not None:
                have_read(len(block))
    return f"{value:08x}"
