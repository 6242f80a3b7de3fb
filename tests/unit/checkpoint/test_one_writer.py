"""The saver and the folder that it writes: by one job at a time, safe from a power cut, refused in one line."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ultrafuser_mega.checkpoint import saver, tensors
from ultrafuser_mega.checkpoint.chunks import Chunk
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.saver import Saver, copies_for
from ultrafuser_mega.checkpoint.sources import SourceFiles
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.checkpoint.unfinished import alone, finish, refuse_out
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.training.run_folder import locked_run

NAME = Progress(2, 4).folder


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("meeting") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that takes nothing, with a folder in it; a folder without permissions would take root's files."""
    place = tmp_path / "read_only"
    (place / "run").mkdir(parents=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error})")
    try:
        (place / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True, capture_output=True)
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def new_saver(folder: Path) -> Saver:
    return Saver(folder, keep=2, keep_every=0, identity={}, sources=SourceFiles({"sources.json": b"{}"}))


def chunk(rows: int = 4) -> Chunk:
    return Chunk("gate.w", (rows, 4), (0, 0), torch.arange(4.0 * rows).view(rows, 4), padded=False)


def test_of_two_jobs_that_save_under_one_name_the_second_is_refused_and_the_first_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun, may_write = saver.write_checkpoint, threading.Event(), threading.Event()

    def late(folder: Path, *arguments: Any) -> None:
        (folder / "begun").touch()
        begun.set()
        assert may_write.wait(30)
        write(folder, *arguments)

    monkeypatch.setattr(saver, "write_checkpoint", late)
    first, second = new_saver(tmp_path), new_saver(tmp_path)
    first.save(Progress(2, 4), [chunk()])
    assert begun.wait(30)
    second.save(Progress(2, 4), [chunk()])
    refused = f"{tmp_path}/.{NAME}.partial: another process writes to this name; wait, or choose another name"
    assert second.wait() == refused
    assert list(second.news()) == [f"{refused}; training goes on"]
    second.save(Progress(2, 5), [chunk()])  # clears away what interrupted saves left, and this is none
    may_write.set()
    assert first.wait() is second.wait() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, Progress(2, 5).folder]
    assert (tmp_path / NAME / "begun").is_file()
    assert torch.equal(CheckpointTensors(tmp_path / NAME).read("gate.w"), chunk().data)


def test_a_folder_that_was_made_anew_meanwhile_is_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lock = fcntl.flock

    def after_another_process(handle: int, how: int) -> None:
        folder.rename(tmp_path / "done")
        folder.mkdir()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", after_another_process)
    with pytest.raises(InputError, match=r"folder: another process writes to this name"), alone(folder):
        pass


def test_everything_is_on_the_disk_before_the_folder_gets_its_name_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path)))
        sync(handle)

    def renamed(path: Path, to: Path) -> Path:
        done.append("rename")
        return rename(path, to)

    (tmp_path / "new" / "sources").mkdir(parents=True)
    for name in ("progress.json", "sources/config.yaml"):
        (tmp_path / "new" / name).touch()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    finish(tmp_path / "new", tmp_path / "out")
    assert set(done[:-2]) == {"new", "new/sources", "new/progress.json", "new/sources/config.yaml"}
    assert done[-2:] == ["rename", "."]


def test_a_read_only_file_system_is_one_line_with_the_path_and_what_to_do(read_only: Path) -> None:
    saving = new_saver(read_only / "run")
    saving.save(Progress(2, 4), [chunk()])
    advice = "Read-only file system; name a place that can be written, or mount this one so"
    assert saving.wait() == f"{read_only}/run/{NAME}: cannot be read or written ({advice})"
    for run in ("run", "new"):
        said = rf"/{run}: cannot be written: Read-only file system; use another runs folder$"
        with pytest.raises(InputError, match=said), locked_run(read_only / run, enabled=True):
            pass


def test_a_place_in_which_a_result_could_not_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    refuse_out(tmp_path / "new" / "out")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out, said in [
        ("file", "exists already"),
        ("link", "exists already"),
        ("file/new/out", rf"^--out .*/file/new/out: {tmp_path}/file is a file; choose another folder$"),
    ]:
        with pytest.raises(InputError, match=said):
            refuse_out(tmp_path / out)


def test_a_result_on_a_read_only_file_system_is_refused_before_the_work(read_only: Path) -> None:
    with pytest.raises(InputError, match=rf"/new/out: {read_only} cannot be written by this user"):
        refuse_out(read_only / "new" / "out")


@pytest.mark.parametrize(("verified", "least", "most"), [(True, 1, 2**16), (False, 2**22, 2**23)])
def test_of_a_verified_checkpoint_a_slice_is_read_and_not_its_whole_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verified: bool, least: int, most: int
) -> None:
    saving, large = new_saver(tmp_path), chunk(rows=2**18)
    saving.save(Progress(2, 4), [large])
    assert saving.wait() is None
    read: list[int] = []
    readinto = tensors._Part.readinto

    def counted(part: Any, buffer: Any) -> int:
        read.append(readinto(part, buffer))
        return read[-1]

    monkeypatch.setattr(tensors._Part, "readinto", counted)
    found = CheckpointTensors(tmp_path / NAME, verified=verified)
    for row in (7, 2**17):
        assert torch.equal(found.read("gate.w", slice(row, row + 2)), large.data[row : row + 2])
    assert least <= sum(read) <= most


def test_copies_share_blocks_and_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "_BLOCK", 1024)
    made: list[list[torch.Tensor]] = []

    def noted(chunks: list[Chunk]) -> list[torch.Tensor]:
        made.append(copies_for(chunks))
        return made[-1]

    monkeypatch.setattr(saver, "copies_for", noted)
    kinds = (torch.float32, torch.bfloat16)
    numbers = [torch.randn(size).to(kinds[size % 2]) for size in (7, 30, 1, 400, 33, 100, 100)]
    chunks = [Chunk(f"gate.{i}", (len(data),), (0,), data, padded=False) for i, data in enumerate(numbers)]
    saving = new_saver(tmp_path)
    for step in (4, 5):
        saving.save(Progress(2, step), chunks)
        assert saving.wait() is None
        found = CheckpointTensors(tmp_path / Progress(2, step).folder)
        assert all(torch.equal(found.read(f"gate.{i}"), data) for i, data in enumerate(numbers))
        for data in numbers:
            data += 1
    (copies,) = made  # the second save uses them again
    sizes = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies}
    assert list(sizes.values()) == [64 + 128 + 64, 1600 // 64 * 64, 128 + 448 + 448]
