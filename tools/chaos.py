"""One training run under random faults, and the same run undisturbed: what was survived, and whether both end equal.

    python tools/chaos.py --config C --ranks 8 --faults 100 --seed 1 --work DIR --out chaos.json [key.sub=value ...]

Faults come at a drawn step, rank and phase, loading and saving among the phases; the seed decides all of it. Their
names are those of nvidia-resiliency-ext's injector, and four more:

    SIGKILL OS_ABORT SEGFAULT   the rank is gone
    WORKLOAD_EXC ASYNC_EXC      an exception, where the rank is or out of nowhere: a defect
    SIGSTOP LOCK_GIL            the rank hangs, and its peers wait for it
    SIGTERM SIGINT              the rank alone is asked to stop
    PREEMPT                     SIGUSR1 to the launcher, as Slurm sends it
    DAMAGE                      bytes of the newest checkpoint change, and the rank is killed
    FULL                        a save meets a kernel's limit on the size of files (a full disk would take root)
    NAN                         gradients of so many steps in a row that the run has to go back

The ranks run the package's own program (ultrafuser_mega.launch.rank) under its own launcher. The job is started again
whenever it has ended as asked, as a scheduler does; any other end fails the test. Survived is a fault behind which a
step was done that had not been done before it. Ended by SIGTERM, this tool stops the job and reports what there is;
called again with the same arguments, it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from forked import Forked, StoreElsewhere
from injector import ASKS, KINDS, SKIPS, Fault, Hooks, drawn

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS, list_checkpoints
from ultrafuser_mega.config import load_config
from ultrafuser_mega.errors import EXIT_GO_ON
from ultrafuser_mega.launch import local
from ultrafuser_mega.launch.rank import train_main
from ultrafuser_mega.training.skipping import SKIPPED_FILE

_ASKED = (EXIT_GO_ON, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
#: What the run says of faults that end no process: without it they did not come to anything.
_SAID = {"FULL": "; training goes on", "NAN": "going back to ", "DAMAGE": ": damaged: "}
_REPORT_EVERY_S = 10.0
_FAULT_INTERVAL_S = 30 * 60


class Run:
    """One of the two runs: its job, started until it has ended by itself, and what is known of it.

    Args:
        name: of the run.
        options: of the command line.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.folder = name, options, Path(options.work) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.overrides = [*options.overrides, f"name={name}", f"runs={Path(options.work) / 'runs'}"]
        self.overrides += [f"faults.skips={SKIPS}", f"faults.hang_minutes={options.hang_minutes}"]
        self.overrides += [f"data.store={Path(options.work) / 'store'}"]
        self.config = load_config(Path(options.config), self.overrides)
        self.run_dir = self.config.run_dir

    def faults(self, draw: Any) -> list[Fault]:
        """Those of the folder; drawn where there are none yet."""
        path = self.folder / "faults.json"
        if not path.is_file():
            path.write_text(json.dumps([asdict(fault) for fault in draw()]))
        return [Fault(**fault) for fault in json.loads(path.read_text())]

    @property
    def ends(self) -> list[tuple[int, float, float]]:
        """Of every start: exit code, when it ended, and its seconds."""
        return [(code, at, seconds) for code, at, seconds in read_lines(self.folder / "ends")]

    @property
    def has_ended(self) -> bool:
        """By itself."""
        return bool(self.ends) and self.ends[-1][0] not in _ASKED

    def train(self) -> Iterator[None]:
        """Start the job until it has ended by itself; now and then the caller may look."""
        while not self.has_ended:
            begun = time.monotonic()
            with (self.folder / "log").open("a") as log:
                command = [sys.executable, __file__, "--role", "launcher", *shared(self.options)]
                command += ["--work", str(self.folder), *self.overrides]
                if self.options.forked:
                    job: Any = Forked(main, command, output=log)
                else:
                    job = subprocess.Popen(command, stdout=log, stderr=log)
                try:
                    while job.poll() is None:
                        yield
                        time.sleep(0.1)
                finally:
                    job.send_signal(signal.SIGTERM)
                    job.wait()
            with (self.folder / "ends").open("a") as file:
                file.write(json.dumps([job.poll(), time.monotonic(), time.monotonic() - begun]) + "\n")

    def tensors(self) -> dict[str, Any]:
        """Name -> size and checksum of the files of weights and optimizer state in the last checkpoint."""
        record = json.loads((list_checkpoints(self.run_dir / "checkpoints")[-1][1] / PROGRESS).read_text())
        return {name: noted for name, noted in record["files"].items() if name.endswith(".distcp")}

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of all steps."""
        lines = read_lines(self.run_dir / "metrics.jsonl")
        return [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]

    def files(self) -> set[str]:
        """All that lies in the run's folder, but for checkpoints that it may keep and names that tell the time."""
        found = [path for _, path in list_checkpoints(self.run_dir / "checkpoints")]
        kept = found[-self.config.checkpoint.keep :]
        paths = (path for path in self.run_dir.rglob("*") if not any(path.is_relative_to(folder) for folder in kept))
        return {str(path.relative_to(self.run_dir)) for path in paths if not path.name.startswith("events.out")}


def read_lines(path: Path) -> list[Any]:
    """What each line of a file of JSON says; [] where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def measured(run: Run, faults: Sequence[Fault]) -> dict[str, Any]:
    """What became of every fault that has happened."""
    steps, ends = read_lines(run.folder / "steps"), run.ends
    happened = [path for number in range(len(faults)) for path in run.folder.glob(f"{number}.*.fired")]
    noted = [json.loads(path.read_text()) for path in happened]
    survived, fired, in_phase = Counter[str](), Counter[str](), Counter[str]()
    new_step: defaultdict[str, list[float]] = defaultdict(list)
    to_exit: defaultdict[str, list[float]] = defaultdict(list)
    for fault, what, after in zip(faults, noted, [*noted[1:], None], strict=False):
        fired[fault.kind] += 1
        in_phase[what["phase"]] += 1
        exits = [at for code, at, _ in ends if at > what["time"] and code in _ASKED] if fault.kind in ASKS else []
        if exits and after is not None and after["time"] < exits[0]:  # which may be that one's
            exits = []
        since = exits[0] if exits else what["time"]
        later = [at for at, step in steps if at > since and step > what["step"]]
        survived[fault.kind] += bool(later) or (run.has_ended and ends[-1][0] == 0)
        new_step[fault.kind] += [at - what["time"] for at in later[:1]]
        to_exit[fault.kind] += [at - what["time"] for at in exits[:1]]
    killed = new_step["SIGKILL"]
    log = " ".join((run.folder / "log").read_text().split()) if (run.folder / "log").is_file() else ""  # it is wrapped
    return {
        "drawn": len(faults),
        "injected": fired.total(),
        "survived": {kind: f"{survived[kind]} of {fired[kind]}" for kind in KINDS if fired[kind]},
        "said_in_log": {kind: log.count(words) for kind, words in _SAID.items() if fired[kind]},
        "injected_in_phase": dict(in_phase.most_common()),
        "seconds_to_first_new_step": {kind: summary(new_step[kind]) for kind in KINDS if new_step[kind]},
        "seconds_from_signal_to_exit": {kind: summary(to_exit[kind]) for kind in KINDS if to_exit[kind]},
        "useful_share_at_one_kill_per_30_min": 1 - statistics.mean(killed) / _FAULT_INTERVAL_S if killed else None,
        "starts": len(ends),
    }


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Of a kind's faults."""
    middle = statistics.median(seconds)
    return {"count": len(seconds), "least": min(seconds), "median": middle, "most": max(seconds)}


def compared(one: Run, other: Run) -> dict[str, Any]:
    """The undisturbed run and the other, when both are over."""
    known = {one.run_dir, other.run_dir}
    left = [path.name for path in other.run_dir.parent.iterdir() if path not in known]
    return {
        "losses_equal": one.losses() == other.losses(),
        "weights_and_optimizer_equal": one.tensors() == other.tensors(),
        "left_behind": sorted(left + list((other.files() ^ one.files()) - {SKIPPED_FILE})),
        "processes_left": processes_of(Path(other.options.work)),
    }


def processes_of(work: Path) -> list[int]:
    """Those that were started for runs in ``work`` and are still there, but for this one and what started it."""
    here = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in here and any(part.startswith(str(work)) for part in process.cmdline()):
                found.append(process.pid)
    return found


def chaos(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both runs and their comparison; the report as it stands now and then, and in the end."""
    undisturbed, disturbed = Run("undisturbed", options), Run("chaos", options)
    layout = undisturbed.config.layouts[0].model_dump(mode="json", exclude_defaults=True)
    report = {"ranks": options.ranks, "layout": layout, "seed": options.seed, "forked": options.forked}
    undisturbed.faults(list)
    for _ in undisturbed.train():
        yield report
    if undisturbed.ends[-1][0] != 0:
        raise SystemExit((undisturbed.folder / "log").read_text()[-3000:])
    report["undisturbed_seconds"] = sum(seconds for _, _, seconds in undisturbed.ends)
    phases = [read_lines(undisturbed.folder / f"phases.{rank}") for rank in range(options.ranks)]
    steps = sum(stage.steps for stage in undisturbed.config.stages.values())
    faults = disturbed.faults(lambda: drawn(options.kinds, options.faults, options.ranks, steps, phases, options.seed))
    for _ in disturbed.train():
        yield report | measured(disturbed, faults)
    report |= measured(disturbed, faults) | {"chaos_seconds": sum(seconds for _, _, seconds in disturbed.ends)}
    report["finished"] = disturbed.ends[-1][0] == 0
    if report["finished"]:
        report |= compared(undisturbed, disturbed)
    else:
        print((disturbed.folder / "log").read_text()[-3000:], file=sys.stderr)
    yield report


def is_good(report: dict[str, Any]) -> bool:
    """Whether all faults that were drawn came, and left no trace."""
    equal = report.get("losses_equal") and report.get("weights_and_optimizer_equal")
    clean = not report.get("left_behind") and not report.get("processes_left")
    survived = all(len(set(text.split(" of "))) == 1 for text in report["survived"].values())
    said = all(report["said_in_log"].values())
    return bool(equal and clean and survived and said and report["injected"] == report["drawn"])


def rounded(value: Any) -> Any:
    """Four digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def shared(options: argparse.Namespace) -> list[str]:
    """Arguments that all roles have."""
    same = ["--config", options.config, "--ranks", str(options.ranks), "--faults", str(options.faults)]
    return [*same, *(["--forked"] if options.forked else [])]


def launch(options: argparse.Namespace) -> int:
    """The launcher's part."""
    config = load_config(Path(options.config), options.overrides)
    if options.forked:
        forking = SimpleNamespace(Popen=functools.partial(Forked, main), TimeoutExpired=subprocess.TimeoutExpired)
        local.subprocess = forking  # type: ignore[assignment]
        local.TCPStore = StoreElsewhere  # type: ignore[assignment, misc]
    program = [__file__, "--role", "rank", *shared(options), "--work", options.work, *options.overrides]
    return local.launch_local(options.ranks, program, local.from_checkpoints(config.run_dir), 3 * options.faults)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work", required=True, help="a new folder, or that of a call to go on with")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-minutes", type=float, default=0.25)
    parser.add_argument("--out", type=Path, help="the report, also while it grows")
    parser.add_argument(
        "--forked", action="store_true", help="ranks start with imports done; the times are without those then"
    )
    roles = ["conductor", "launcher", "rank"]
    parser.add_argument("--role", choices=roles, default="conductor", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(unknown)}: needed some of {','.join(KINDS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a fault was not survived or the runs differ, 75 where this was ended before."""
    options = parsed(arguments)
    if options.role == "launcher":
        return launch(options)
    if options.role == "rank":
        run_dir = load_config(Path(options.config), options.overrides).run_dir
        Hooks(Path(options.work), int(os.environ["RANK"]), run_dir).install()
        return train_main(Path(options.config), options.overrides, resume=False, requeue=True)
    gc.freeze()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report: dict[str, Any] = {}
    code, looked = EXIT_GO_ON, time.monotonic()
    try:
        for report in chaos(options):
            if options.out and time.monotonic() > looked + _REPORT_EVERY_S:
                options.out.write_text(json.dumps(rounded(report), indent=1) + "\n")
                looked = time.monotonic()
        code = 0 if is_good(report) else 1
    except KeyboardInterrupt:
        print("ended before its end", file=sys.stderr)
    if options.out:
        options.out.write_text(json.dumps(rounded(report), indent=1) + "\n")
    print(json.dumps(rounded(report), indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
