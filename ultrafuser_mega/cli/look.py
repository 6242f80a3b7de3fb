"""``ultrafuser look``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def look(
    places: Annotated[
        list[Path],
        typer.Argument(metavar="DIR_OR_FILES...", help="what clean or synthesize made, or files of rows"),
    ],
    out: Annotated[Path, typer.Option(help="the page, an HTML file")] = Path("look.html"),
    title: Annotated[str, typer.Option(help="over the page; default: the places' names", show_default=False)] = "",
    samples: Annotated[int, typer.Option(min=1, help="rows that can be read in it")] = 1500,
) -> None:
    """Write a page to look at instruction data with: one HTML file that loads nothing from anywhere.

    \b
    ultrafuser look clean --out clean.html
    ultrafuser look data/*.jsonl

    Topics by their numbers of rows, lengths, what was removed and why, what is shared with benchmarks, and samples of
    every topic to read and search. Keys are enough: Tab and Enter go through topics, Escape goes back, / searches.
    """
    from ultrafuser_mega.looking import look as write_page

    print(write_page(places, out, title=title, samples=samples))
