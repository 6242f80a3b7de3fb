"""The folder of a run: one job at a time, and what an earlier run of the same name left is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.device import launch_name

_LOCK = ".lock"
_LAUNCH = ".launch"  # the launch that trains or trained last here


@contextmanager
def locked_run(run_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Make ``run_dir`` and keep other jobs out of it; one rank holds the lock.

    Raises:
        InputError: another job has it, or the folder cannot be made.
    """
    with ExitStack() as stack:
        if enabled:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(run_dir / _LOCK, timeout=0))
            except Timeout:
                raise InputError(f"{run_dir}: another job is training under this name; choose another name") from None
            except OSError as error:
                raise InputError(f"{run_dir}: cannot be written: {error.strerror}; use another runs folder") from None
        yield


def refuse_running(run_dir: Path) -> None:
    """Look whether a job trains in ``run_dir`` now, before anything costs minutes; nothing is made or kept.

    Raises:
        InputError: one does.
    """
    if (run_dir / _LOCK).is_file():
        with locked_run(run_dir, enabled=True):
            pass


def begun_by_this_launch(run_dir: Path) -> bool:
    """Whether an earlier attempt of this launch began what lies in ``run_dir``; asked by one rank, always the same."""
    try:
        return (run_dir / _LAUNCH).read_text() == launch_name()
    except OSError:
        return False


def begin_run(run_dir: Path, *, fresh: bool) -> Path | None:
    """The run begins, or goes on; done by the rank that :func:`begun_by_this_launch` is asked by.

    Args:
        run_dir: locked.
        fresh: begins anew, for which an earlier run is set aside; not what an attempt of the same launch left.

    Returns where an earlier run went, None if nothing was set aside.
    """
    kept = set_aside(run_dir) if fresh and not begun_by_this_launch(run_dir) else None
    (run_dir / _LAUNCH).write_text(launch_name())
    return kept


def left_by_a_run(run_dir: Path) -> list[Path]:
    """What is in its folder beside a token store, which ``prepare`` may have made before there was a run."""
    return [path for path in run_dir.iterdir() if path.name not in ("store", _LOCK)] if run_dir.is_dir() else []


def set_aside(run_dir: Path) -> Path | None:
    """Keep what an earlier run of the same name left: move it to ``<run_dir>.1`` (or .2, ...), all but its token store.

    Otherwise its checkpoints would pass for the new run's. Returns where it went, None if there was nothing.
    """
    left = left_by_a_run(run_dir)
    if not left:
        return None
    run_dir = run_dir.resolve()  # a link leads to another disk, on which what is moved must stay
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    kept.mkdir()
    for path in left:
        path.rename(kept / path.name)
    return kept
