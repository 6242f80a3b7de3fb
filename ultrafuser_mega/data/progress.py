"""A bar on stderr that tells how far files have been read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def reading_bar(paths: Sequence[Path], doing: str, wanted: bool) -> Iterator[Callable[[int | None], None]]:
    """Yields show(bytes read of the current file, or None when it is done); a bar if wanted.

    Args:
        paths: the files, in the order in which they are read.
        doing: what is done with them, as in "tokenising".
        wanted: whether there is a bar at all.
    """
    sizes = [path.stat().st_size for path in paths]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not wanted) as bar:
        task = bar.add_task(doing, total=sum(sizes))
        done = 0
        files = iter(sizes)

        def show(read: int | None) -> None:
            nonlocal done
            if read is None:
                done += next(files)
            bar.update(task, completed=done + (read or 0))

        yield show
