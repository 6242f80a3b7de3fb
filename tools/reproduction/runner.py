"""Experiments as processes side by side: what is finished is not run again, what is not goes on where it was.

Each is a copy of this process, where all imports are done: beside short runs those would be most of the time. This
process therefore has one thread. A signal is passed on: trainers end behind a checkpoint, and the same call goes on.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import torch
from forked import Forked, StoreElsewhere, end_with_parent

from reproduction.experiments import Experiment
from ultrafuser_mega.cli.main import main as ultrafuser
from ultrafuser_mega.errors import EXIT_BAD_INPUT, EXIT_DIVERGED
from ultrafuser_mega.launch import local
from ultrafuser_mega.runtime.quiet import quiet_dependencies

#: What the commands import when they are called, and their copies need not.
_COMMANDS_IMPORT = (
    "ultrafuser_mega.baselines.btx",
    "ultrafuser_mega.baselines.fusechat",
    "ultrafuser_mega.convert.export",
    "ultrafuser_mega.evaluation.job",
    "ultrafuser_mega.launch.rank",
    "ultrafuser_mega.reporting.plots",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
)
_LOOK_EVERY_S = 0.2
_UNTIL_KILLED_S = 60.0  # of a run that was asked to stop: a step, an evaluation and a checkpoint


class StoppedError(Exception):
    """Someone asked to stop; what ran has ended behind what it could save."""


class ExperimentError(Exception):
    """A run failed in a way that is no finding."""


@dataclass(frozen=True)
class Job:
    """An experiment of a seed.

    Attributes:
        seed: which.
        experiment: of it.
        logs: folder of what it prints.
    """

    seed: int
    experiment: Experiment
    logs: Path

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.logs / f"{self.experiment.key}.log"

    @property
    def left_out(self) -> Path:
        """Where it is said why this model cannot be made."""
        return self.logs / f"{self.experiment.key}.left_out"

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.experiment.row}"


@dataclass(frozen=True)
class _Started:
    job: Job
    process: Forked
    output: IO[str]
    begun: float


def run(jobs: Sequence[Job], side_by_side: int, what: str) -> None:
    """Do all that is not done; says what is, how many of how many, and the time that is left.

    Args:
        jobs: in the order in which they are begun.
        side_by_side: at once, which share the machine's cores.
        what: they are, for people.

    Raises:
        ExperimentError: one failed; the others have ended behind what they could save.
        StoppedError: a signal came.
    """
    waiting = [job for job in jobs if not job.experiment.is_done]
    first, begun, finished = len(jobs) - len(waiting), time.monotonic(), 0
    if first:
        say(f"{what}: {first} of {len(jobs)} are there already")
    if waiting:
        quiet_dependencies()
        for name in _COMMANDS_IMPORT:
            importlib.import_module(name)
    running: list[_Started] = []
    with _heard() as heard:
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    running.append(_start(waiting.pop(0)))
                time.sleep(_LOOK_EVERY_S)
                if heard:
                    raise StoppedError
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    _ended(one)
                    finished += 1
                    left = (time.monotonic() - begun) / finished * (len(waiting) + len(running))
                    say(
                        f"{what}: {first + finished} of {len(jobs)}: {one.job}: {time.monotonic() - one.begun:.0f} s; "
                        f"about {_minutes(left)} left"
                    )
        finally:
            _end(running)


def say(text: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _start(job: Job) -> _Started:
    job.logs.mkdir(parents=True, exist_ok=True)
    job.left_out.unlink(missing_ok=True)
    output = job.log.open("w")
    command = [sys.executable, "ultrafuser", *job.experiment.arguments]
    # One thread each: small models gain nothing from more, and those of tokenizers would not live on in a rank.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return _Started(job, Forked(_ultrafuser, command, environment, True, output), output, time.monotonic())


def _ended(one: _Started) -> None:
    """Raises ExperimentError where that is no finding about the model."""
    one.output.close()
    job, code = one.job, one.process.wait()
    if code == 0:
        return
    if code in (EXIT_BAD_INPUT, EXIT_DIVERGED) and job.experiment.may_lack:
        job.left_out.write_text(_last_line(job.log) + "\n")
        return
    raise ExperimentError(f"{job}: exit code {code}: {_last_line(job.log)} ({job.log})")


def _end(running: Sequence[_Started]) -> None:
    for one in running:
        one.process.send_signal(signal.SIGTERM)
    for one in running:
        try:
            one.process.wait(_UNTIL_KILLED_S)
        except subprocess.TimeoutExpired:
            one.process.send_signal(signal.SIGKILL)
            one.process.wait()
        one.output.close()


@contextmanager
def _heard() -> Iterator[list[int]]:
    """The signals that come meanwhile."""
    heard: list[int] = []
    before = {
        one: signal.signal(one, lambda number, _: heard.append(number)) for one in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ultrafuser(arguments: Sequence[str]) -> int:
    """The command in a copy of this process; the one rank that it launches is a copy of that."""
    end_with_parent(signal.SIGTERM)
    torch.set_num_threads(1)
    local.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=functools.partial(Forked, _rank), TimeoutExpired=subprocess.TimeoutExpired
    )
    local.TCPStore = StoreElsewhere  # type: ignore[assignment, misc]
    sys.argv = ["ultrafuser", *arguments]
    return _code_of(ultrafuser)


def _rank(arguments: Sequence[str]) -> int:
    from ultrafuser_mega.cli.rank import main

    sys.argv = ["pretrain_fuser.py", *arguments[1:]]  # behind the module's name
    return _code_of(main)


def _code_of(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
