"""From places to the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.looking.gather import gather
from ultrafuser_mega.looking.page import page
from ultrafuser_mega.looking.places import find, rows_of

SAMPLES = 1500


def look(
    places: Sequence[Path],
    out: Path,
    *,
    title: str = "",
    samples: int = SAMPLES,
    picture: tuple[bytes, str] | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        places: folders that ``ultrafuser clean`` or ``ultrafuser synthesize`` made, or files of rows, see places.find.
        out: the HTML file; one that is there is replaced.
        title: over all; "": the places' names.
        samples: rows that can be read in it.
        picture: see page.page.

    Raises:
        InputError: nothing to look at, or no place to write to.
    """
    found = [find(place) for place in places]
    gathered = gather(rows_of(one for holds in found for one in holds.files), samples)
    if not gathered.classes:
        raise InputError(f"{', '.join(map(str, places))}: no conversation to look at")
    report = next((holds.report for holds in found if holds.report is not None), None)
    left_out = next((holds.left_out for holds in found if holds.left_out is not None), None)
    html = page(title or ", ".join(place.name for place in places), gathered, report, left_out, picture)
    with writing(out, as_whole=True):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, html)
    return out
