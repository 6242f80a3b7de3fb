"""`ultrafuser doctor`: what is there, what is missing, and what a missing thing is for."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import pytest
from rich.console import Console

from ultrafuser_mega.cli import machine


def run_doctor() -> tuple[bool, dict[str, str]]:
    """(healthy, first word of every row -> the row)."""
    out = io.StringIO()
    healthy = machine.report(Console(file=out, width=200))
    rows = [line.strip("│┃ ").strip() for line in out.getvalue().splitlines()]
    return healthy, {row.split("  ")[0].strip(" │"): row for row in rows if row}


def test_working_installation_is_healthy() -> None:
    healthy, rows = run_doctor()
    assert healthy
    assert {*machine.REQUIRED, "C++ extensions", "device", "backend", "triton"} <= {row.split(" │")[0] for row in rows}


def test_missing_requirement_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REQUIRED", (*machine.REQUIRED, "no-such-package"))
    healthy, rows = run_doctor()
    assert not healthy
    (row,) = (row for row in rows.values() if row.startswith("no-such-package"))
    assert "missing: pip install -e ." in row


def test_package_that_only_shares_apexs_name_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's apex is a web framework; importing it must not even be tried."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    _, rows = run_doctor()
    (row,) = (row for row in rows.values() if row.startswith("apex"))
    assert "not found" in row
