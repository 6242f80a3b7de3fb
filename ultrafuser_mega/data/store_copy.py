"""A copy of a token store on a node's own disk, so that a job's ranks do not all read one from the network."""

from __future__ import annotations

import shutil
from pathlib import Path

from ultrafuser_mega.data.folders import in_turn, move_into_place, work_folder
from ultrafuser_mega.data.store import MANIFEST, TokenStore
from ultrafuser_mega.errors import InputError, writing


def copy_store(store: Path, out: Path) -> bool:
    """Have ``out`` hold what the finished ``store`` holds, every byte compared with the manifest's checksums.

    A whole copy is used again. What is damaged or of another store makes room. Processes take turns.

    Returns whether anything was copied.

    Raises:
        InputError: ``out`` is the store itself or something other than a store, or what the system has against it.
    """
    wanted = TokenStore.open(store, verify=False).fingerprint
    if out.resolve() == store.resolve():
        raise InputError(f"--copy-to: {out} is the token store itself; name a folder on a disk of this machine")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with in_turn(out):
            if _holds(out, wanted):
                return False
            with work_folder(out) as work:
                shutil.copytree(store, work, dirs_exist_ok=True)
                TokenStore.open(work)
                move_into_place(work, out)
    return True


def _holds(out: Path, fingerprint: str) -> bool:
    if out.exists() and not (out / MANIFEST).is_file():
        raise InputError(f"--copy-to: {out} exists and is no token store; it is left alone, choose another folder")
    try:
        return TokenStore.open(out).fingerprint == fingerprint
    except InputError:
        return False
