"""Whether a token store that is being read is still the one that was opened.

Its files are mapped. One that is removed or replaced by another goes on being read as it was, until nobody has it
open; what is written into one is read. Size and times of a file tell both, its checksum what the writing has done.
"""

from __future__ import annotations

from pathlib import Path

from ultrafuser_mega.data.store import SPLITS, TokenStore, check_file
from ultrafuser_mega.errors import InputError


class StoreWatch:
    """Of one process.

    Args:
        store: opened, its files as they are to stay.
    """

    def __init__(self, store: TokenStore) -> None:
        for name in store.class_names:
            for split in SPLITS:
                store.split(name, split)  # mapped now, not when it is first asked for
        self._noted = {
            store.folder / name / split / file: (noted, _state(store.folder / name / split / file))
            for name in store.class_names
            for split in SPLITS
            for file, noted in store.manifest["splits"][name][split]["files"].items()
        }
        self._told = False

    def look(self) -> str | None:
        """A line for people the first time that a file is gone or another has its name: what is read stays the same.

        Raises:
            InputError: what is in a file is no longer what was prepared.
        """
        gone = None
        for path, (noted, before) in self._noted.items():
            now = _state(path)
            if now == before:
                continue
            if now is None or before is None or now[:2] != before[:2]:
                gone = gone or path
                continue
            try:
                check_file(path, noted, verify=True)
            except InputError as problem:
                raise InputError(f"{problem}; it changed while training read it, after the newest checkpoint") from None
            self._noted[path] = (noted, now)  # only its times
        if gone is None or self._told:
            return None
        self._told = True
        return (
            f"{gone}: removed or replaced; training goes on with what it was, a restart would read what is there then"
        )


def _state(path: Path) -> tuple[int, int, int, int] | None:
    """Which file it is (device, number), its size and when it was last written; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
