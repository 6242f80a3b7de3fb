"""Run training jobs side by side, one process each, and show their progress.

The workers are ordinary subprocesses (``python -m ultrafuser_mega.toy.worker``), not multiprocessing
children, so a caller needs no ``__main__`` guard and may itself be a daemonic process. A worker tells
its progress as JSON lines on stdout; when its parent dies that pipe breaks and the worker ends too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_TOLD_LINES = 20
_SIDE_BY_SIDE = 3  # jobs that share the cores; one alone would wait for its threads more than they save


@dataclass(frozen=True)
class Job:
    """What one worker needs; goes to it as JSON.

    ``folder`` holds the tokenizer and receives the model; ``start`` holds the weights to begin with; None: random ones.
    """

    name: str
    folder: str
    data: str
    shape: dict[str, Any]
    steps: int
    batch_size: int
    lr: float
    seed: int
    device: str
    start: str | None = None


def run_jobs(jobs: list[Job], console: Console) -> dict[str, dict[str, float]]:
    """Run all ``jobs`` at once; returns held-out loss in nats per response token as ``[specialist][class]``.

    Raises:
        RuntimeError: a worker failed; the others are ended first.
    """
    messages: SimpleQueue[tuple[str, dict[str, Any] | None]] = SimpleQueue()
    threads = max(1, _cores() // _SIDE_BY_SIDE)
    workers = {job.name: _start(job, threads) for job in jobs}
    said: dict[str, list[str]] = {name: [] for name in workers}
    readers = [
        reader
        for name, worker in workers.items()
        for reader in (
            threading.Thread(target=_relay, args=(name, worker, messages), daemon=True),
            threading.Thread(target=_keep_tail, args=(worker, said[name]), daemon=True),
        )
    ]
    for reader in readers:
        reader.start()
    losses: dict[str, dict[str, float]] = {}
    try:
        with _bars(console) as bars:
            tasks = {job.name: bars.add_task(job.name, total=job.steps, loss="") for job in jobs}
            running = set(workers)
            while running:
                name, message = messages.get()
                if message is None:
                    running.discard(name)
                    if workers[name].wait() or name not in losses:
                        raise RuntimeError(_failure(name, workers[name], said[name]))
                elif "step" in message:
                    bars.update(tasks[name], completed=message["step"], loss=f"loss {message['loss']:.3f}")
                else:
                    losses[name] = message["heldout_loss"]
                    own = losses[name].get(name, fmean(losses[name].values()))
                    bars.update(tasks[name], loss=f"held-out {own:.3f}")
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
        for reader in readers:
            reader.join()
    return {job.name: losses[job.name] for job in jobs}


def _start(job: Job, threads: int) -> subprocess.Popen[str]:
    package_parent = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "ultrafuser_mega.toy.worker", json.dumps(asdict(job))],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": search_path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _relay(name: str, worker: subprocess.Popen[str], messages: SimpleQueue[tuple[str, dict[str, Any] | None]]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        messages.put((name, json.loads(line)))
    messages.put((name, None))


def _keep_tail(worker: subprocess.Popen[str], said: list[str]) -> None:
    assert worker.stderr is not None
    for line in worker.stderr:
        said.append(line.rstrip())
        del said[:-_TOLD_LINES]


def _failure(name: str, worker: subprocess.Popen[str], said: list[str]) -> str:
    return "\n".join((f"training the toy specialist '{name}' ended with code {worker.returncode}:", *said))


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("toy specialist [bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _cores() -> int:
    """Cores this process may use (macOS cannot say, and has them all)."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
