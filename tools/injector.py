"""Faults for ``chaos.py``: drawn beforehand, and made to happen by hooks around a rank's program. No hook is in it.

A fault waits for its step, its rank and its phase, and for a step that was done behind the fault before it; where its
phase does not come for some steps, it comes in any. Which have happened, files in the run's folder say: every process
of the job sees them, and those that come after it too.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ultrafuser_mega.checkpoint import checkpoint, saver
from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.checkpoint.saver import Saver
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.trainable import Trainable
from ultrafuser_mega.training.trainer import Trainer

#: Those before PREEMPT have the names that they have in nvidia-resiliency-ext's injector.
KINDS = (
    *("SIGKILL", "OS_ABORT", "SEGFAULT", "WORKLOAD_EXC", "ASYNC_EXC", "SIGSTOP", "LOCK_GIL", "SIGTERM", "SIGINT"),
    *("PREEMPT", "DAMAGE", "FULL", "NAN"),
)
ASKS = ("SIGTERM", "SIGINT", "PREEMPT")
HANGS = ("SIGSTOP", "LOCK_GIL")
LOADING, WRITING, PUBLISHING = "loading", "writing a checkpoint", "publishing a checkpoint"
SKIPS = 2  # faults.skips of both runs
_LATE_STEPS = 3  # behind which a fault's phase no longer matters
_SMALL_FILE = 1 << 12
_FOREVER_S = 3600


@dataclass(frozen=True)
class Fault:
    """step: counted through both stages, the first at which it may come; phase: "" where it has one of its own."""

    kind: str
    rank: int
    step: int
    phase: str


def drawn(kinds: Sequence[str], count: int, ranks: int, steps: int, phases: list[list[str]], seed: int) -> list[Fault]:
    """``count`` faults, every kind about equally often, by their steps.

    Args:
        kinds: to draw from.
        count: of faults.
        ranks: of the job.
        steps: of both stages; the last of them are kept free for what comes late.
        phases: of every rank, in order.
        seed: decides everything.
    """
    draw = random.Random(seed)
    chosen = [kinds[number % len(kinds)] for number in range(count)]
    draw.shuffle(chosen)
    last = max(2, steps - max(5, steps // 20))
    faults = []
    for kind, step in zip(chosen, sorted(draw.randint(2, last) for _ in chosen), strict=True):
        rank = draw.randrange(ranks)
        own = kind in ("FULL", "NAN")
        if own:  # on a rank that has a file of its own beside the metrics, and gradients in any stage
            rank = ranks - 1
        fitting = [phase for phase in phases[rank] if not (kind in HANGS and phase == LOADING)]  # nobody watches yet
        faults.append(Fault(kind, rank, step, "" if own else draw.choice(fitting)))
    return faults


class Hooks:
    """Around one rank's program: faults from ``folder/faults.json``, each once; what happened is written there."""

    def __init__(self, folder: Path, rank: int, run_dir: Path) -> None:
        self.folder, self.rank, self.run_dir = folder, rank, run_dir
        self.faults = [Fault(**fault) for fault in json.loads((folder / "faults.json").read_text())]
        self.main, self.began = threading.get_ident(), time.monotonic()
        self.seen = set[str]()
        self.trainer: Trainer | None = None
        self.step, self.done = 0, 0  # of the run; by this process
        self.waits = (-1, 0)  # a fault's number, and the steps that this process had done when it saw it next
        self.poisoned = 0

    def install(self) -> None:
        """For this process, which leaves no core behind either."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        enter, load, step, clip = Phases._enter, Trainer.load, Trainer.step, Trainable.clip_gradients
        save, write, remove = Saver.save, checkpoint.write_chunks, saver.remove_checkpoint

        def entered(phases: Phases, name: str, whole: str | None) -> None:
            enter(phases, name, whole)
            self.at(name)

        def loaded(trainer: Trainer) -> None:
            self.trainer = trainer
            if trainer.plan.resume is not None:
                self.step = trainer.global_step(trainer.plan.resume[0])
            self.at(LOADING)
            load(trainer)

        @functools.wraps(step)
        def stepped(trainer: Trainer, number: int, trainable: Trainable, batches: Any, at: int, begun: float) -> Any:
            self.step = at + 1 + (trainer.stage(1).steps if number == 2 else 0)
            done = step(trainer, number, trainable, batches, at, begun)
            self.done += 1
            if self.rank == 0 and not done[0].skipped:
                self.note("steps", [time.monotonic(), self.step])
            return done

        def saved(saving: Saver, *of: Any, **options: Any) -> None:
            saving.wait()
            self.limit_files(resource.RLIM_INFINITY)
            number = self.armed("")
            may = not (self.is_last() or self.is_stopping())  # only the last save must succeed
            if number is not None and self.faults[number].kind == "FULL" and may and self.fire(number):
                self.limit_files(_SMALL_FILE)
            save(saving, *of, **options)

        def written(*of: Any) -> Any:
            self.at(WRITING)
            return write(*of)

        def removed(path: Path) -> None:
            remove(path)
            self.at(PUBLISHING)

        def clipped(trainable: Trainable) -> Tensor:
            number = self.armed("")
            if number is not None and self.faults[number].kind == "NAN" and self.may_poison():
                self.fire(number)
                self.poisoned = SKIPS
            if self.poisoned:
                self.poisoned -= 1
                for buffer in trainable.wrapped.buffers:
                    buffer.grad_data.fill_(math.nan)
            return clip(trainable)

        wrapped: dict[tuple[object, str], object] = {
            (Phases, "_enter"): entered,
            (Trainer, "load"): loaded,
            (Trainer, "step"): stepped,
            (Trainable, "clip_gradients"): clipped,
            (Saver, "save"): saved,
        }
        wrapped |= {(checkpoint, "write_chunks"): written, (saver, "remove_checkpoint"): removed}
        for (owner, name), function in wrapped.items():
            setattr(owner, name, function)

    @property
    def checkpoints(self) -> list[Path]:
        return [path for _, path in list_checkpoints(self.run_dir / "checkpoints")]

    def is_new(self, kind: str) -> bool:
        """Whether the newest checkpoint met none of this kind."""
        before = [json.loads(path.read_text())["newest"] for path in self.folder.glob(f"*.{kind}.fired")]
        return bool(self.checkpoints) and str(self.checkpoints[-1]) not in before

    def is_last(self) -> bool:
        """Whether a stage ends with this step."""
        assert self.trainer is not None
        return self.step in (self.trainer.stage(1).steps, self.trainer.stage(1).steps + self.trainer.stage(2).steps)

    def is_stopping(self) -> bool:
        """Whether the run may be about to end with a checkpoint, since it was asked to while this process was there."""
        asked = [path for kind in ASKS for path in self.folder.glob(f"*.{kind}.fired")]
        return any(json.loads(path.read_text())["time"] > self.began for path in asked)

    def may_poison(self) -> bool:
        """Whether all that comes of it is that the run goes back: twice behind one checkpoint would be divergence."""
        return self.is_new("NAN") and not self.is_last() and not self.is_stopping()

    def armed(self, phase: str) -> int | None:
        """The next fault's number, if it is this rank's, and this is its place: ``phase``, "" for one of its own."""
        number = sum(1 for _ in self.folder.glob("*.fired"))
        if self.trainer is None or number >= len(self.faults) or self.poisoned:
            return None
        if self.waits[0] != number:
            self.waits = (number, self.done)
        fault, before = self.faults[number], self.faults[number - 1].kind if number else ""
        needed = SKIPS + 1 if before == "NAN" else int(number > 0)
        if fault.rank != self.rank or self.step < fault.step:
            return None
        if self.done - self.waits[1] < needed and phase != LOADING:
            return None
        late = self.step > fault.step + _LATE_STEPS and phase not in ("", LOADING)
        return number if phase == fault.phase or (late and fault.phase != "") else None

    def fire(self, number: int, phase: str = "") -> bool:
        """Note that a fault happens now; False where the process's other thread was first."""
        newest = str(self.checkpoints[-1]) if self.checkpoints else ""
        noted = {"time": time.monotonic(), "step": self.step, "phase": phase, "newest": newest}
        own = self.folder / f".{self.rank}.{threading.get_ident()}"
        own.write_text(json.dumps(noted))
        try:
            os.link(own, self.folder / f"{number}.{self.faults[number].kind}.fired")
        except FileExistsError:
            return False
        finally:
            own.unlink()
        return True

    def note(self, name: str, what: Any) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(what) + "\n")

    def at(self, phase: str) -> None:
        """This rank enters a phase."""
        if phase not in self.seen and "evaluation" not in phase:
            self.seen.add(phase)
            self.note(f"phases.{self.rank}", phase)
        if (number := self.armed(phase)) is None:
            return
        kind = self.faults[number].kind
        if kind == "DAMAGE" and (len(self.checkpoints) < 2 or not self.is_new(kind)):
            return
        if self.fire(number, phase):
            self.happen(kind)

    def happen(self, kind: str) -> None:
        """To this process; does not come back from most."""
        if kind == "DAMAGE":
            damage(self.checkpoints[-1])
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "OS_ABORT":
            os.abort()
        elif kind == "SEGFAULT":
            ctypes.string_at(1)
        elif kind == "WORKLOAD_EXC":
            raise RuntimeError("WORKLOAD_EXC")
        elif kind == "ASYNC_EXC":
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.main), ctypes.py_object(RuntimeError))
        elif kind == "LOCK_GIL":
            ctypes.PyDLL(None).sleep(_FOREVER_S)
        elif kind == "PREEMPT":
            os.kill(os.getppid(), signal.SIGUSR1)
        else:
            os.kill(os.getpid(), signal.Signals[kind])

    @staticmethod
    def limit_files(size: int) -> None:
        """A limit of the kernel on the size of this process's files."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def damage(path: Path) -> None:
    """Change bytes in the middle of the largest file of a checkpoint."""
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        file.write(b"chaos!")
