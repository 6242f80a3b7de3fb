"""Is a program that a model wrote right? A benchmark's tests call it across the wall between two sandboxes.

The program never meets the tests: they run in a sandbox of their own, and a call travels to the program's as plain data
and comes back as plain data. So a program that exits early, prints what a pass looks like, patches ``assert``, returns
an object that equals everything or looks for the expected values through its own process has nothing to gain.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files

from ultrafuser_mega.evaluation.sandbox import Limits, check_sandbox, end, start_in_sandbox

_BOXED = "ultrafuser_mega.evaluation.boxed"


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


def check_program(program: str, test: ProgramTest, limits: Limits | None = None) -> Verdict:
    """Run ``program``, a whole module that defines the entry point, against its tests.

    Args:
        program: what the model wrote.
        test: the benchmark's.
        limits: of the program and of its tests; the time is that of both together.

    Raises:
        InputError: there is no sandbox on this machine.
    """
    check_sandbox()
    limits = limits or Limits()
    until = time.monotonic() + limits.seconds
    task = {"program": program, "entry_point": test.entry_point, "setup": test.setup, "tests": test.tests}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(json.dumps(task).encode())
        given.seek(0)
        to_program, from_tests = os.pipe()
        to_tests, from_program = os.pipe()
        try:
            processes.append(start_in_sandbox(_text("candidate"), (), limits, to_program, from_program))
            files_of_tests = [given.fileno(), said.fileno()]
            processes.append(start_in_sandbox(_text("tests"), files_of_tests, limits, to_tests, from_tests))
            for descriptor in (to_program, from_tests, to_tests, from_program):
                os.close(descriptor)
            processes[1].wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Verdict(False, f"not done within {limits.seconds:g} s")
        finally:
            for process in processes:
                end(process)
        said.seek(0)
        verdict = said.read()
    if not verdict:
        return Verdict(False, "the tests ended themselves")
    return Verdict(**json.loads(verdict))


def _text(name: str) -> str:
    return "".join((files(_BOXED) / f"{part}.py").read_text() for part in ("frames", name))
