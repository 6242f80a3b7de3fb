"""kill -9 at any moment of an export: the folder has its name only when it is whole, and going on ends in equal bytes.

Two ways to find moments. Chosen ones: the child is killed before or after one of its file operations, which it makes in
pieces of 4 kB, so that kills land inside tensors, between shards and on both sides of every rename. Instants: it is
killed from outside, whatever it is doing.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from support.families import write_family
from support.trio import ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert import shards
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_config, plan_folders

FEW, MANY = 3, 40  # kills: of a quick test, and of a slow one with more of the same
PIECE = 4096
KILLS = pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
OPERATIONS = {"open", "write", "sendfile", "fsync", "mkdir", "rename", "replace", "unlink"}


@pytest.fixture(scope="module", params=["specialist:a", "fused"])
def job(request: pytest.FixtureRequest, trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder, named after what to export, of a ``checkpoint`` and its export as it should be (``out``); read only."""
    root = tmp_path_factory.mktemp("killed") / request.param
    if request.param == "fused":
        config = FuserConfig.model_validate(config_tree(trio, root / "runs", ONE))
        import_specialists(plan_config(config, None), root / "checkpoint")
    else:
        import_specialists(plan_folders({"a": write_family(root / "source", "qwen3")}, None), root / "checkpoint")
    write(root, root / "out")
    return root


def write(job: Path, out: Path) -> None:
    """The export, from where it stands; in some eight shards."""
    size = 200_000 if job.name == "fused" else 60_000
    export(job / "checkpoint", out, job.name, resume=True, verify=False, shard_bytes=size)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_child(function: Callable[..., None], *args: Any) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """A process that runs ``function(connection, *args)``; forked where everything is imported."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    child = context.Process(target=function, args=(theirs, *args))
    child.start()
    theirs.close()
    return child, ours


class Pieces(io.FileIO):
    """A file that is written in small pieces, with nothing in between to hold them back."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        return sum(super(Pieces, self).write(view[i : i + PIECE]) or 0 for i in range(0, len(view), PIECE))


def export_up_to(connection: Connection, job: Path, out: Path, moment: int | None) -> None:
    """Export, ending at a moment by SIGKILL; without one, send what happens at each."""
    real = Path.open
    seen: list[str] = []

    def open_in_pieces(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Pieces(path, mode) if mode == "wb" else real(path, mode, *args, **kwargs)

    def watch(frame: Any, event: str, called: Any) -> None:
        if event in ("c_call", "c_return") and called.__name__ in OPERATIONS:
            if len(seen) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(f"{'before' if event == 'c_call' else 'after'} {called.__name__}")

    Path.open = open_in_pieces  # type: ignore[method-assign, assignment]
    sys.setprofile(watch)
    write(job, out)
    sys.setprofile(None)
    connection.send(seen)


@KILLS
def test_export_killed_at_chosen_moments_goes_on_to_identical_bytes(job: Path, tmp_path: Path, kills: int) -> None:
    (tmp_path / "whole").mkdir()
    child, connection = in_child(export_up_to, job, tmp_path / "whole" / "out", None)
    moments: list[str] = connection.recv()
    child.join()
    expected = bytes_of(job / "out")
    assert bytes_of(tmp_path / "whole" / "out") == expected
    named = max(i for i, moment in enumerate(moments) if moment == "before rename")
    for moment in sorted({named, named + 1, *random.Random(0).sample(range(len(moments)), kills)}):
        out = tmp_path / str(moment) / "out"
        out.parent.mkdir()
        child, _ = in_child(export_up_to, job, out, moment)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert out.exists() == (moment > named), moments[moment]
        if not out.exists():
            write(job, out)
        assert bytes_of(out) == expected, moments[moment]
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def export_slowly(connection: Connection, job: Path, out: Path) -> None:
    real = shards.hashlib.sha256

    class Slow:
        """Stretches the time between tensors, files and renames."""

        @staticmethod
        def sha256(data: Any = b"") -> Any:
            time.sleep(0.005)
            return real(data)

    shards.hashlib = Slow  # type: ignore[assignment]
    connection.send("begins")
    write(job, out)


@KILLS
def test_export_killed_again_and_again_ends_in_identical_bytes(job: Path, tmp_path: Path, kills: int) -> None:
    """Each start goes on where the kill left off; whenever one is through, the next begins anew."""
    out, expected = tmp_path / "out", bytes_of(job / "out")
    delays = random.Random(1)
    for _ in range(kills):
        child, connection = in_child(export_slowly, job, out)
        assert connection.recv() == "begins"
        time.sleep(delays.uniform(0.0, 0.2))
        child.kill()
        child.join()
        if out.exists():
            assert bytes_of(out) == expected
            shutil.rmtree(out)
    write(job, out)
    assert bytes_of(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
