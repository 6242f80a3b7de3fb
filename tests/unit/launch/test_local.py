"""A job on this machine: what is the last line, the exit code, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ultrafuser_mega.launch.local import from_checkpoints, launch_local

RANK = "import json, os, pathlib, signal, subprocess, sys, time; rank = int(os.environ['RANK']); "
WAIT = "time.sleep(60)"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run with two checkpoints."""
    for name in ("stage1-step0000003", "stage1-step0000006"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "progress.json").write_text("{}")
    return tmp_path / "run"


def launch(run_dir: Path, program: str) -> int:
    return launch_local(3, ["-c", RANK + program], from_checkpoints(run_dir))


def is_gone(process: int) -> bool:
    """Whether it is no more, or only for its parent to ask after."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] in "ZX"
    except OSError:
        return True


def wait_for(path: Path) -> str:
    until = time.monotonic() + 60
    while not (path.is_file() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    return path.read_text()


def test_ranks_are_told_their_places_and_end_well(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"]
    program = f"sys.stdout.write(' '.join(os.environ[key] for key in {told}) + chr(10))"
    assert launch(run_dir, program) == 0
    out, err = capfd.readouterr()
    assert sorted(out.split("\n")) == ["", "0 3 3", "1 3 3", "2 3 3"]
    assert err == ""


def test_a_rank_that_is_killed_is_named_last(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(run_dir, f"os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else {WAIT}") == 1
    assert capfd.readouterr().err == (
        "failed: rank 1 of 3 was killed by SIGKILL (by the system, when memory runs out); "
        f"--resume goes on from {run_dir}/checkpoints/stage1-step0000006\n"
    )


def test_a_rank_whose_mapped_file_became_shorter_is_told_of_as_that(
    run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cut = "import mmap; f = open(str(rank), 'w+b'); f.write(bytes(9)); f.flush(); m = mmap.mmap(f.fileno(), 9)"
    program = f"os.chdir({str(run_dir)!r}); {cut}; rank == 1 and (f.truncate(0), print(m[0])); {WAIT}"
    assert launch(run_dir, program) == 1
    assert "rank 1 of 3 was killed by SIGBUS (a file that it reads from has become shorter" in capfd.readouterr().err


def test_restarts_that_are_used_up_end_with_the_last_cause(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = f"os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else {WAIT}"
    assert launch_local(3, ["-c", RANK + program], from_checkpoints(run_dir), max_restarts=2) == 1
    killed, newest = "failed: rank 1 of 3 was killed by SIGKILL", f"{run_dir}/checkpoints/stage1-step0000006"
    *restarts, last = capfd.readouterr().err.splitlines()
    hint = "(by the system, when memory runs out)"
    assert restarts == [f"{killed} {hint}; restart {number} of 2: going on from {newest}" for number in (1, 2)]
    assert last == f"{killed} {hint}; --resume goes on from {newest}"


@pytest.mark.parametrize("code", [2, 3, 75, 130])
def test_what_would_come_again_and_what_was_asked_for_is_not_started_again(run_dir: Path, code: int) -> None:
    put = "pathlib.Path('starts').open('a').write('x')"
    program = f"os.chdir({str(run_dir)!r}); rank == 0 or sys.exit(0); {put}; sys.exit({code})"
    assert launch_local(2, ["-c", RANK + program], from_checkpoints(run_dir), max_restarts=2) == code
    assert (run_dir / "starts").read_text() == "x"


@pytest.mark.parametrize("code", [1, 2, 3])
def test_what_a_rank_has_said_is_the_last_word_and_its_exit_code_the_jobs(
    run_dir: Path, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    said = "pathlib.Path(os.environ['TORCHELASTIC_ERROR_FILE']).write_text(json.dumps({'message': 'x'}))"
    program = f"rank == 2 or {WAIT}; {said}; sys.stderr.write('error: x' + chr(10)); sys.exit({code})"
    assert launch(run_dir, program) == code
    assert capfd.readouterr().err == "error: x\n"


def test_a_rank_that_ends_without_a_word_is_named(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(run_dir / "new", f"sys.exit(7) if rank == 0 else {WAIT}") == 7
    assert capfd.readouterr().err == "failed: rank 0 of 3 ended with exit code 7; the run has no checkpoint yet\n"


@pytest.mark.parametrize(
    ("numbers", "code", "line"),
    [
        ([signal.SIGINT], 130, "interrupted at once; --resume goes on from "),
        ([signal.SIGINT] * 5, 130, "interrupted at once; --resume goes on from "),
        ([signal.SIGTERM], 143, "ended by SIGTERM at once; --resume goes on from "),
    ],
)
def test_a_signal_that_ranks_do_not_listen_to_ends_every_one(
    run_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    numbers: list[signal.Signals],
    code: int,
    line: str,
) -> None:
    def send() -> None:
        for rank in range(3):
            wait_for(tmp_path / f"{rank}")
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    def late(*_: object) -> None:
        """What is sent when the job is over."""

    before = signal.signal(signal.SIGINT, late)
    sender = threading.Thread(target=send)
    sender.start()
    # What answers SIGTERM slowly is killed in the end; this one answers after a second signal would have come.
    slow = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(1)))"
    slow += "; signal.signal(signal.SIGINT, signal.SIG_DFL)"  # no traceback
    put = f"pathlib.Path({str(tmp_path)!r}, str(rank)).write_text(str(os.getpid()))"
    try:
        assert launch(run_dir, f"{slow}; {put}; {WAIT}") == code
        sender.join()
        assert signal.getsignal(signal.SIGINT) is late
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == f"{line}{run_dir}/checkpoints/stage1-step0000006\n"
    assert all(is_gone(int((tmp_path / f"{rank}").read_text())) for rank in range(3))


@pytest.mark.parametrize(("restarts", "code"), [(1, 128 + signal.SIGUSR1), (0, 1)])
def test_a_rank_that_hangs_once_a_signal_was_heard_is_not_started_again_but_the_job_ended_as_asked(
    restarts: int, code: int, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    says_why = "(pathlib.Path(os.environ['TORCHELASTIC_ERROR_FILE']).write_text('hangs'), os._exit(1))"
    listen = f"signal.signal(signal.SIGUSR1, lambda *_: {says_why} if rank == 1 else None)"

    def send() -> None:
        for rank in range(3):  # whoever does not listen yet is ended by the signal itself
            wait_for(run_dir / f"up{rank}")
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=send).start()
    program = f"{listen}; pathlib.Path({str(run_dir)!r}, f'up{{rank}}').write_text('yes'); {WAIT}"
    assert launch_local(3, ["-c", RANK + program], from_checkpoints(run_dir), max_restarts=restarts) == code
    said = f"ended by SIGUSR1 at once; --resume goes on from {run_dir}/checkpoints/stage1-step0000006\n"
    assert capfd.readouterr().err == (said if restarts else "")


def test_a_restart_has_the_ranks_that_are_left(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = f"os.environ['WORLD_SIZE'] == '2' and sys.exit(0); rank == 1 and os.kill(os.getpid(), 9); {WAIT}"
    assert launch_local(3, ["-c", RANK + program], from_checkpoints(run_dir), 2, lambda: 2) == 0
    assert capfd.readouterr().err == (
        "failed: rank 1 of 3 was killed by SIGKILL (by the system, when memory runs out); restart 1 of 2 on 2 of 3 "
        f"ranks: going on from {run_dir}/checkpoints/stage1-step0000006\n"
    )


def test_processes_that_a_killed_rank_had_started_are_ended_too(run_dir: Path, tmp_path: Path) -> None:
    child = f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(subprocess.Popen(['sleep', '60']).pid))"
    assert launch(run_dir, f"rank == 1 or {WAIT}; {child}; os.kill(os.getpid(), signal.SIGKILL)") == 1
    left, until = int((tmp_path / "child").read_text()), time.monotonic() + 30
    while not is_gone(left) and time.monotonic() < until:
        time.sleep(0.02)
    assert is_gone(left)
