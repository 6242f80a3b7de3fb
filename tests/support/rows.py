"""Files of rows, as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: list[Any], *, as_array: bool = False) -> Path:
    """``path`` with a row per line, or with one array of all."""
    path.write_text(json.dumps(rows, indent=1) if as_array else "".join(json.dumps(row) + "\n" for row in rows))
    return path
