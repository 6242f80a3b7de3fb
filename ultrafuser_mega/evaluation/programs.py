"""Is a program that a model wrote right? A benchmark's tests call it across the wall between two sandboxes.

The program never meets the tests: they run in a sandbox of their own, and a call travels to the program's as plain data
and comes back as plain data. So a program that exits early, prints what a pass looks like, patches ``assert``, returns
an object that equals everything or looks for the expected values through its own process has nothing to gain.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files

from ultrafuser_mega.evaluation.bubblewrap import Bubblewrap
from ultrafuser_mega.evaluation.sandbox import Limits, Running, Sandbox, last_words

_BOXED = "ultrafuser_mega.evaluation.boxed"
_PIPE = 1 << 16  # bytes that a pipe takes before anyone reads; Linux gives up to 1 MiB to whoever asks
_MOST = 1 << 20


@dataclass(frozen=True)
class ProgramTest:
    """Tests of one function, as HumanEval has them.

    entry_point: the function's name.
    setup: defines what the tests use besides it, as HumanEval's prompts do.
    tests: defines ``check(candidate)``, which raises where an answer is wrong.
    """

    entry_point: str
    setup: str
    tests: str


@dataclass(frozen=True)
class Verdict:
    """Whether all tests passed; why not, in a few words."""

    passed: bool
    reason: str = ""


def check_program(
    program: str, test: ProgramTest, limits: Limits | None = None, sandbox: Sandbox | None = None
) -> Verdict:
    """Run ``program``, a whole module that defines the entry point, against its tests.

    Args:
        program: what the model wrote.
        test: the benchmark's.
        limits: of the program and of its tests; the time is that of both together.
        sandbox: where both run, each for itself; None: bubblewrap.

    Raises:
        InputError: the sandbox does not work on this machine.
    """
    sandbox = sandbox or Bubblewrap()
    sandbox.check()
    limits = limits or Limits()
    until = time.monotonic() + limits.seconds
    task = _frame({"program": program, "entry_point": test.entry_point, "setup": test.setup, "tests": test.tests})
    if len(task) > _MOST:
        return Verdict(False, f"program and tests are longer than {_MOST >> 20} MB")
    running: list[Running] = []
    with tempfile.TemporaryFile() as said:
        pipes = to_program, from_tests, to_tests, from_program = *os.pipe(), *os.pipe()
        try:
            try:
                # The task is there before the program, which can only write behind it.
                if len(task) > _PIPE:
                    fcntl.fcntl(from_program, fcntl.F_SETPIPE_SZ, _MOST)
                os.write(from_program, task)
                running.append(sandbox.start(_text("candidate"), limits, to_program, from_program, subprocess.DEVNULL))
                running.append(sandbox.start(_text("tests"), limits, to_tests, from_tests, said))
            finally:
                for descriptor in pipes:
                    os.close(descriptor)
            running[1].wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Verdict(False, f"not done within {limits.seconds:g} s")
        finally:
            for one in running:
                one.end()
        said.seek(0)
        return _verdict(said.read(), sandbox)


def _frame(value: object) -> bytes:
    """A message as boxed/frames.py has it."""
    message = pickle.dumps(value, protocol=4)
    return struct.pack("<q", len(message)) + message


def _verdict(said: bytes, sandbox: Sandbox) -> Verdict:
    """What the tests' sandbox says in its last line. The program cannot write there, and tests have it only to say so:
    anything else is the sandbox's own complaint."""
    if not said:
        return Verdict(False, "the tests ended themselves")
    try:
        return Verdict(**json.loads(said.splitlines()[-1]))
    except (ValueError, TypeError):
        raise sandbox.refusal(f"{sandbox.name} did not run a program ({last_words(said, '')})") from None


def _text(name: str) -> str:
    return "".join((files(_BOXED) / f"{part}.py").read_text() for part in ("frames", name))
