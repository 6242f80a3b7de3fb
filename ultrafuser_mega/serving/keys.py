"""Keys that clients must show: read from a file or the environment, compared in constant time, never printed."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from ultrafuser_mega.errors import InputError, writing

VARIABLE = "ULTRAFUSER_API_KEY"


class Keys:
    """The keys that open the server; none: everybody may ask.

    Args:
        keys: any number.
    """

    def __init__(self, keys: list[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def load(cls, path: Path | None) -> Keys:
        """Those of a file, one a line, and that of the environment.

        Raises:
            InputError: the file cannot be read, or holds none.
        """
        keys = [key] if (key := os.environ.get(VARIABLE, "").strip()) else []
        if path is not None:
            with writing(path):
                lines = path.read_bytes().decode("utf-8", "replace").splitlines()
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                raise InputError(f"--api-keys {path}: holds no key; put one on a line")
            keys += found
        if any(not key.isascii() or " " in key for key in keys):
            raise InputError(f"--api-keys, {VARIABLE}: a key may hold no space and ASCII only")
        return cls(keys)

    def open(self, authorization: bytes | None) -> bool:
        """Whether an ``Authorization`` header shows one of them; every key is compared, whatever comes first."""
        scheme, _, shown = (authorization or b"").partition(b" ")
        right = [hmac.compare_digest(shown.strip(), key) for key in self._keys]
        return not right or (scheme.lower() == b"bearer" and any(right))
