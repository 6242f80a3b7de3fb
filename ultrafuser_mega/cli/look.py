"""``ultrafuser look``."""

from __future__ import annotations

import sys
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
    model: Annotated[
        str | None,
        typer.Option(
            help="PATH[@PART] of a model, as generate takes it: adds a map (t-SNE) of how it represents the questions",
            show_default=False,
        ),
    ] = None,
    per_class: Annotated[int, typer.Option(min=2, help="questions of every class on the map")] = 5000,
    device: Annotated[str, typer.Option(help="of --model: auto, cpu, cuda:N")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="of --model: fp32, bf16, fp16; default: as stored", show_default=False)
    ] = None,
) -> None:
    """Write a page to look at instruction data with: one HTML file that loads nothing from anywhere.

    \b
    ultrafuser look clean --out clean.html
    ultrafuser look data/*.jsonl --model runs/demo@text

    Topics by their numbers of rows, lengths, what was removed and why, what is shared with benchmarks, and samples of
    every topic to read and search. Keys are enough: Tab and Enter go through topics, Escape goes back, / searches.
    The map is also written beside the page, as OUT with the ending .map.png.
    """
    from ultrafuser_mega.looking import look as write_page

    picture = None if model is None else _picture(places, model, per_class, device, dtype)
    print(write_page(places, out, title=title, samples=samples, picture=picture))
    if picture is not None:
        from ultrafuser_mega.errors import writing

        drawing = out.with_suffix(".map.png")
        with writing(drawing):
            drawing.write_bytes(picture[0])
        print(drawing)


def _picture(places: list[Path], model: str, per_class: int, device: str, dtype: str | None) -> tuple[bytes, str]:
    """The map, and what it shows; says which questions are not on it."""
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from ultrafuser_mega.inference.mean_states import mean_states
    from ultrafuser_mega.inference.model import opened_model
    from ultrafuser_mega.looking.gather import drawn
    from ultrafuser_mega.looking.places import find, rows_of
    from ultrafuser_mega.looking.plane import on_plane, purity, usable
    from ultrafuser_mega.reporting.class_map import plot_classes

    rows = [
        row for some in drawn(rows_of(one for p in places for one in find(p).files), per_class).values() for row in some
    ]
    texts = [row.conversation.turns[0][0] for row in rows]
    console = Console(stderr=True)
    with (
        opened_model(model, device, dtype) as opened,
        Progress(console=console, disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task("reading", total=len(texts))
        vectors = mean_states(opened, texts, lambda done: bar.update(task, completed=done))
    good = usable(vectors)
    for place in np.flatnonzero(~good)[:5]:
        print(
            f"not on the map, its vector is not finite: {rows[place].class_name}: {texts[place][:80]!r}",
            file=sys.stderr,
        )
    classes = np.array([row.class_name for row in rows])[good]
    points = on_plane(vectors[good])
    told = (
        f"{good.sum():,} questions by t-SNE of the mean last hidden states of {model}; of the ten nearest of each, "
        f"{purity(points, classes):.0%} are of its class."
    )
    if not good.all():
        told += f" {(~good).sum():,} without a finite vector are left out."
    print(told)
    return plot_classes({name: points[classes == name] for name in dict.fromkeys(classes.tolist())}), told
