"""The ``ultrafuser`` command as people call it, in this process."""

from __future__ import annotations

import sys

import pytest

from ultrafuser_mega.cli import main


def ultrafuser(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of ``ultrafuser arguments...``."""
    monkeypatch.setattr(sys, "argv", ["ultrafuser", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
