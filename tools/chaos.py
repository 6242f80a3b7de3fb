"""One training run under random faults, and the same run undisturbed: what was survived, and whether both end equal.

    python tools/chaos.py --config C --ranks 8 --faults 100 --seed 1 --work DIR --out chaos.json [key.sub=value ...]

Faults come at a drawn step, rank and phase, a save among the phases; the seed decides all of it. Their names are those
of nvidia-resiliency-ext's injector, and five more:

    KILL ABORT      the rank is gone: SIGKILL, SIGABRT
    ASYNC_EXC       an exception out of nowhere: a defect
    STOP            SIGSTOP: the rank hangs, and its peers wait for it
    TERM INT        the rank alone is asked to stop
    PREEMPT         SIGUSR1 to the launcher, as Slurm sends it
    DAMAGE          bytes of the newest checkpoint change, and the rank is killed
    FULL            a save meets a limit of the kernel on the size of files (RLIMIT_FSIZE; a full disk would take root)
    NAN             gradients of so many steps in a row that the run has to go back

The ranks run the package's own program (ultrafuser_mega.launch.rank); this file's hooks are around it, none is in it.
The job is started again whenever it has ended as asked, as a scheduler does; any other end fails the test. Survived is
a fault behind which a step was done that had not been done before it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ultrafuser_mega.checkpoint import checkpoint
from ultrafuser_mega.checkpoint.checkpoint import PROGRESS, list_checkpoints
from ultrafuser_mega.config import FuserConfig, load_config
from ultrafuser_mega.errors import EXIT_GO_ON
from ultrafuser_mega.launch.local import launch_local
from ultrafuser_mega.launch.rank import train_main
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.trainable import Trainable
from ultrafuser_mega.training.trainer import Trainer

KINDS = ("KILL", "ABORT", "ASYNC_EXC", "STOP", "TERM", "INT", "PREEMPT", "DAMAGE", "FULL", "NAN")
WRITING = "writing a checkpoint"
SKIPS = 2  # faults.skips of both runs
_ASKED = (EXIT_GO_ON, 128 + signal.SIGINT)
_SMALL_FILE = 1 << 12


@dataclass(frozen=True)
class Fault:
    """step: counted through both stages, the first at which it may come; phase: "" where it has one of its own."""

    kind: str
    rank: int
    step: int
    phase: str


def drawn(kinds: list[str], count: int, ranks: int, steps: int, phases: list[list[str]], seed: int) -> list[Fault]:
    """``count`` faults, every kind about equally often, by their steps.

    Args:
        kinds: to draw from.
        count: of faults.
        ranks: of the job.
        steps: of both stages; nothing comes at the last.
        phases: of every rank, in order.
        seed: decides everything.
    """
    draw = random.Random(seed)
    chosen = [kinds[number % len(kinds)] for number in range(count)]
    draw.shuffle(chosen)
    faults = []
    for kind, step in zip(chosen, sorted(draw.randint(1, steps - 1) for _ in chosen), strict=True):
        rank = draw.randrange(ranks)
        if kind in ("FULL", "NAN"):  # whose rank has a file of its own beside the metrics, and gradients in any stage
            rank = ranks - 1
        faults.append(Fault(kind, rank, step, "" if kind in ("FULL", "NAN") else draw.choice(phases[rank])))
    return faults


class Hooks:
    """Around one rank's program: faults from ``folder/faults.json``, each once; what happened is written there."""

    def __init__(self, folder: Path, rank: int, run_dir: Path) -> None:
        self.folder, self.rank, self.run_dir = folder, rank, run_dir
        self.faults = [Fault(**fault) for fault in json.loads((folder / "faults.json").read_text())]
        self.main, self.seen = threading.get_ident(), set[str]()
        self.trainer: Trainer | None = None
        self.poisoned = 0

    def install(self) -> None:
        """For this process."""
        enter, step, write, clip = Phases._enter, Trainer.step, checkpoint.write_chunks, Trainable.clip_gradients

        def entered(phases: Phases, name: str, whole: str | None) -> None:
            enter(phases, name, whole)
            self.at(name)

        @functools.wraps(step)
        def stepped(trainer: Trainer, *of: Any) -> Any:
            self.trainer = trainer
            done = step(trainer, *of)
            if self.rank == 0 and not done[0].skipped:
                self.note("steps", [time.time(), trainer.at[0]])
            return done

        def written(*of: Any) -> Any:
            self.at(WRITING)
            return write(*of)

        def clipped(trainable: Trainable) -> Tensor:
            if (number := self.armed("NAN", "")) is not None and len(self.checkpoints) > 0 and self.is_new():
                self.fire(number)
                self.poisoned = SKIPS
            if self.poisoned:
                self.poisoned -= 1
                for buffer in trainable.wrapped.buffers:
                    buffer.grad_data.fill_(math.nan)
            return clip(trainable)

        wrapped: dict[tuple[object, str], object] = {
            (Phases, "_enter"): entered,
            (Trainer, "step"): stepped,
            (Trainable, "clip_gradients"): clipped,
        }
        wrapped |= {(checkpoint, "write_chunks"): written}
        for (owner, name), function in wrapped.items():
            setattr(owner, name, function)

    @property
    def checkpoints(self) -> list[Path]:
        return [path for _, path in list_checkpoints(self.run_dir / "checkpoints")]

    def is_new(self) -> bool:
        """Whether there is a checkpoint that no poisoned gradients were behind before: twice would be divergence."""
        before = [json.loads(path.read_text())["newest"] for path in self.folder.glob("*.NAN.fired")]
        return str(self.checkpoints[-1]) not in before

    def armed(self, kind: str | None, phase: str) -> int | None:
        """The next fault's number, if it is this rank's, of ``kind`` (None: any) and this is its place."""
        number = sum(1 for _ in self.folder.glob("*.fired"))
        if self.trainer is None or number >= len(self.faults) or self.poisoned:
            return None
        fault = self.faults[number]
        here = fault.rank == self.rank and self.trainer.at[0] >= fault.step and fault.phase == phase
        return number if here and kind in (None, fault.kind) else None

    def fire(self, number: int) -> None:
        """Note that a fault happens now, once and for all."""
        path = self.folder / f"{number}.{self.faults[number].kind}.fired"
        newest = str(self.checkpoints[-1]) if self.checkpoints else ""
        assert self.trainer is not None
        with path.open("x") as file:
            json.dump({"time": time.time(), "step": self.trainer.at[0], "newest": newest}, file)
            file.flush()
            os.fsync(file.fileno())

    def note(self, name: str, what: Any) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(what) + "\n")

    def at(self, phase: str) -> None:
        """This rank enters a phase."""
        if (
            self.trainer is not None and "evaluation" not in phase and phase not in self.seen
        ):  # which may not come again
            self.seen.add(phase)
            self.note(f"phases.{self.rank}", phase)
        if phase == "save":
            self.limit_files(resource.RLIM_INFINITY)
            if (number := self.armed("FULL", "")) is not None:
                self.fire(number)
                self.limit_files(_SMALL_FILE)
        number = self.armed(None, phase)
        if number is None or self.faults[number].phase == "":
            return
        kind = self.faults[number].kind
        if kind == "DAMAGE" and len(self.checkpoints) < 2:
            return
        self.fire(number)
        if kind == "DAMAGE":
            damage(self.checkpoints[-1])
        if kind == "ABORT":
            os.abort()
        elif kind == "ASYNC_EXC":
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.main), ctypes.py_object(RuntimeError))
        elif kind == "PREEMPT":
            os.kill(os.getppid(), signal.SIGUSR1)
        else:
            os.kill(os.getpid(), signal.Signals[f"SIG{'KILL' if kind == 'DAMAGE' else kind}"])

    @staticmethod
    def limit_files(size: int) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def damage(path: Path) -> None:
    """Change bytes in the middle of the largest file of a checkpoint."""
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        file.write(b"chaos!")


def run_job(folder: Path, config: Path, overrides: list[str], ranks: int, restarts: int) -> Iterator[tuple[int, float]]:
    """The job until it ends by itself: (exit code, when) of every launch."""
    while True:
        with (folder / "log").open("a") as log:
            command = [sys.executable, __file__, "--role", "launcher", "--work", str(folder), "--config", str(config)]
            command += ["--ranks", str(ranks), "--restarts", str(restarts), *overrides]
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        yield code, time.time()
        if code not in _ASKED:
            return


def files_of(run_dir: Path) -> dict[str, Any]:
    """Name -> size and checksum of the tensors of a run's last checkpoint."""
    record = json.loads((list_checkpoints(run_dir / "checkpoints")[-1][1] / PROGRESS).read_text())
    return {name: noted for name, noted in record["files"].items() if name.endswith(".distcp")}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of all of a run's steps."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def measured(folder: Path, faults: list[Fault], ends: list[tuple[int, float]]) -> dict[str, Any]:
    """What became of every fault."""
    steps, survived, fired = lines(folder / "steps"), Counter[str](), Counter[str]()
    new_step: dict[str, list[float]] = {}
    to_exit: dict[str, list[float]] = {}
    for number, fault in enumerate(faults):
        path = folder / f"{number}.{fault.kind}.fired"
        if not path.is_file():
            continue
        when = json.loads(path.read_text())
        fired[fault.kind] += 1
        asked = fault.kind in ("TERM", "INT", "PREEMPT")
        exits = [at for code, at in ends if at > when["time"] and code in _ASKED][:1] if asked else []
        later = [at for at, step in steps if at > (exits or [when["time"]])[0] and step > when["step"]]
        survived[fault.kind] += bool(later) or ends[-1][0] == 0
        if later:
            new_step.setdefault(fault.kind, []).append(round(later[0] - when["time"], 2))
        to_exit.setdefault(fault.kind, []).extend(round(at - when["time"], 2) for at in exits)
    return {
        "survived": {kind: f"{survived[kind]} of {fired[kind]}" for kind in KINDS if fired[kind]},
        "drawn": len(faults),
        "fired": fired.total(),
        "seconds_to_first_new_step": new_step,
        "seconds_from_signal_to_exit": {kind: seconds for kind, seconds in to_exit.items() if seconds},
    }


def chaos(options: argparse.Namespace) -> dict[str, Any]:
    """Both runs, and their comparison."""
    work, report = Path(options.work), {"ranks": options.ranks, "seed": options.seed}
    configs: dict[str, FuserConfig] = {}
    faults: list[Fault] = []
    ends: list[tuple[int, float]] = []
    for name in ("undisturbed", "chaos"):
        folder = work / name
        folder.mkdir(parents=True)
        if name == "chaos":
            phases = [lines(work / "undisturbed" / f"phases.{rank}") for rank in range(options.ranks)]
            steps = sum(stage.steps for stage in configs["undisturbed"].stages.values())
            faults = drawn(options.kinds, options.faults, options.ranks, steps, phases, options.seed)
        (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
        overrides = [*options.overrides, f"name={name}", f"runs={work / 'runs'}", f"faults.skips={SKIPS}"]
        overrides += [f"faults.hang_minutes={options.hang_minutes}", f"data.store={work / 'store'}"]
        configs[name] = load_config(Path(options.config), overrides)
        begun = time.time()
        ends = list(run_job(folder, Path(options.config), overrides, options.ranks, len(faults)))
        report[f"{name}_seconds"] = round(time.time() - begun, 1)
        if ends[-1][0] != 0:
            print((folder / "log").read_text()[-3000:], file=sys.stderr)
            break
    report |= measured(work / "chaos", faults, ends) | {"launches": len(ends), "finished": ends[-1][0] == 0}
    if report["finished"]:
        one, other = (configs[name].run_dir for name in ("undisturbed", "chaos"))
        report["losses_equal"] = losses(one) == losses(other)
        report["weights_equal"] = files_of(one) == files_of(other)
        declared = {path for _, path in list_checkpoints(other / "checkpoints")} | {one, other}
        found = [*(other / "checkpoints").iterdir(), *other.parent.iterdir()]
        report["left_behind"] = [path.name for path in found if path not in declared]
    return report


def main() -> int:
    """Command line; 1 where a fault was not survived or the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work", required=True, help="an empty or new folder")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-minutes", type=float, default=0.25)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--role", choices=["conductor", "launcher", "rank"], default="conductor", help=argparse.SUPPRESS
    )
    parser.add_argument("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config, work = Path(options.config), Path(options.work)
    if options.role == "launcher":
        same = ["--work", str(work), "--config", str(config), *options.overrides]
        run_dir = load_config(config, options.overrides).run_dir
        return launch_local(options.ranks, [__file__, "--role", "rank", *same], run_dir, options.restarts)
    if options.role == "rank":
        Hooks(work, int(os.environ["RANK"]), load_config(config, options.overrides).run_dir).install()
        return train_main(config, options.overrides, resume=False, requeue=True)
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(unknown)}: needed some of {','.join(KINDS)}")
    report = chaos(options)
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    good = report.get("losses_equal") and report.get("weights_equal") and not report["left_behind"]
    return 0 if good and all(len(set(text.split(" of "))) == 1 for text in report["survived"].values()) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
