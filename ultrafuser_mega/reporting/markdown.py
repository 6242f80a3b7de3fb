"""Tables in Markdown files that others write: model cards, data cards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_MARKUP = re.compile(r"[\\`*_\[\]<>&~$#]")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A GitHub table, each of its lines ended; bars in cells stay theirs."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def as_text(text: str) -> str:
    """A text that others wrote, on one line, as Markdown that shows it and does nothing else."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
