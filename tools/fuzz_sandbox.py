"""Random programs in the sandbox: does any hang, leave a process or an open descriptor, or pass that may not?

    python tools/fuzz_sandbox.py --count 10000 --seed 1 [--code-sandbox bwrap] [--out fuzz.json]

Orphans of this process come back to it (a child subreaper), so its children are all that could be left. Ended early, it
reports what there is; with --out of an earlier report it goes on behind that one's programs, to --count of them in all.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
from random_programs import random_program

from ultrafuser_mega.evaluation.programs import ProgramTest, check_program
from ultrafuser_mega.evaluation.sandbox import Limits, open_sandbox

DOUBLE = ProgramTest(
    "double", "", "def check(candidate):\n    for x in (0, 3, -5):\n        assert candidate(x) == 2 * x\n"
)
LIMITS = Limits(seconds=6.0, cpu_seconds=2, memory_bytes=256 << 20)
_LATE_S = 15.0  # behind the limit; a busy machine takes its time to end a sandbox
_SUBREAPER = 36  # prctl


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--code-sandbox", default="bwrap", choices=("bwrap", "docker"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # the first is ignored where a shell starts this in its background
        signal.signal(number, signal.default_int_handler)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    sandbox = open_sandbox(given.code_sandbox, lambda _: False)
    this = psutil.Process()
    opened = this.num_fds()
    verdicts: Counter[str] = Counter()
    faults: list[str] = []
    slowest = before = 0.0
    if given.out is not None and given.out.is_file():
        earlier = json.loads(given.out.read_text())
        asked, found = (given.seed, given.code_sandbox), (earlier["seed"], earlier["sandbox"])
        if asked != found:
            parser.error(f"--out {given.out}: is of seed {found[0]} in {found[1]}, not {asked[0]} in {asked[1]}")
        verdicts.update(earlier["verdicts"])
        faults += earlier["faults"]
        slowest, before = earlier["slowest_s"], earlier["seconds"]
    began = time.monotonic()
    try:
        for done in range(verdicts.total(), given.count):
            seed = given.seed * 1_000_000 + done
            program, may_be_right = random_program(seed)
            start = time.monotonic()
            verdict = check_program(program, DOUBLE, LIMITS, sandbox)
            took = time.monotonic() - start
            slowest = max(slowest, took)
            verdicts[_kind(verdict.passed, verdict.reason)] += 1
            if took > LIMITS.seconds + _LATE_S:
                faults.append(f"{seed}: took {took:.1f} s")
            if verdict.passed and not may_be_right:
                faults.append(f"{seed}: passed")
            if left := _left(this):
                faults.append(f"{seed}: left {left}")
            if this.num_fds() != opened:
                faults.append(f"{seed}: {this.num_fds() - opened} descriptors left open")
                opened = this.num_fds()
            if (done + 1) % 500 == 0:
                print(f"{done + 1} programs, {time.monotonic() - began:.0f} s, {len(faults)} faults", flush=True)
    except KeyboardInterrupt:
        print("ended early", flush=True)
    report = {
        "programs": verdicts.total(),
        "seed": given.seed,
        "sandbox": given.code_sandbox,
        "seconds": round(before + time.monotonic() - began, 1),
        "slowest_s": round(slowest, 2),
        "limit_s": LIMITS.seconds,
        "verdicts": dict(verdicts.most_common()),
        "faults": faults,
    }
    print(json.dumps(report, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if faults else 0


def _left(this: psutil.Process) -> list[str]:
    """What is still there: a sandbox that was killed takes a moment to be gone."""
    until = time.monotonic() + _LATE_S
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = this.children(recursive=True)
        if not left or time.monotonic() > until:
            return [str(one) for one in left]
        time.sleep(0.005)


def _kind(passed: bool, reason: str) -> str:
    return "passed" if passed else reason.split(":")[0][:40]


if __name__ == "__main__":
    raise SystemExit(main())
