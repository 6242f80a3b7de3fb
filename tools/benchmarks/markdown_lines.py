"""Markdown, line by line, for gpu_report.py and the parts it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def section(heading: str) -> Iterator[str]:
    yield from ("", f"## {heading}", "")


def table(columns: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
