"""``--code-sandbox``: who is asked what, what docker is told, and that all three run the same two programs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.containers import IMAGE, Docker
from ultrafuser_mega.evaluation.programs import ProgramTest, check_program
from ultrafuser_mega.evaluation.sandbox import QUESTIONS, Limits, Unsandboxed, open_sandbox

DOUBLE = ProgramTest("double", "", "def check(candidate):\n    assert candidate(3) == 6, 'of 3'\n")
RIGHT, WRONG = "def double(x):\n    return x + x\n", "def double(x):\n    return x\n"
QUICK = Limits(seconds=60.0)

#: Plays docker: "run" starts what stands behind the image here, "kill" is noted, others answer.
FAKE = f"""#!/bin/sh
here=$(dirname "$0")
echo "$*" | head -n 1 >> "$here/log"
case "$1" in
  version) echo 29.0; exit $(cat "$here/down" 2>/dev/null || echo 0) ;;
  image) exit $(cat "$here/lacks" 2>/dev/null || echo 0) ;;
  kill) pkill -KILL -P "$(cat "$here/$2")"; exit 0 ;;
esac
name=$3
echo $$ > "$here/$name"
while [ "$1" != "{IMAGE}" ]; do shift; done
shift 2
{sys.executable} "$@"
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a docker that is none; its log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(FAKE)
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def never(question: str) -> bool:
    raise AssertionError(question)


def test_docker_runs_both_programs_in_containers_without_network_or_rights(docker: Path) -> None:
    sandbox = open_sandbox("docker", never)
    verdicts = [check_program(program, DOUBLE, QUICK, sandbox) for program in (RIGHT, WRONG)]
    assert [(one.passed, one.reason) for one in verdicts] == [(True, ""), (False, "wrong answer of 3")]
    runs = [line for line in (docker / "log").read_text().splitlines() if line.startswith("run")]
    assert len(runs) == 1 + 2 * 2  # one to see that it works
    for option in (
        "--rm",
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--pids-limit 64",
        f"--memory {2 << 30}",
        f"--memory-swap {2 << 30}",
        "--cpus 1",
        "--user 65534:65534",
        "--pull never",
    ):
        assert all(option in run for run in runs)


def test_a_container_that_goes_on_is_killed_by_its_name(docker: Path) -> None:
    began = time.monotonic()
    verdict = check_program("import time\ntime.sleep(600)", DOUBLE, Limits(seconds=3.0), open_sandbox("docker", never))
    assert verdict.reason == "not done within 3 s" and time.monotonic() - began < 300
    lines = (docker / "log").read_text().splitlines()
    started = [line.split()[2] for line in lines if line.startswith("run")][1:]
    killed = [line.removeprefix("kill ") for line in lines if line.startswith("kill")]
    # Two start side by side, in any order; the tests may end by themselves behind the program's end.
    assert killed and len(set(killed)) == len(killed) and set(killed) <= set(started)


@pytest.mark.parametrize(
    ("file", "problem"),
    [("down", r"no Docker daemon answers \(29.0\); start Docker"), ("lacks", rf"docker pull {IMAGE}; start Docker")],
)
def test_a_docker_that_cannot_is_told(file: str, problem: str, docker: Path) -> None:
    (docker / file).write_text("1")
    with pytest.raises(InputError, match=problem):
        open_sandbox("docker", never)


def test_without_docker_the_refusal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="code sandbox: no docker on the PATH; start Docker, use --code-sandbox bwrap"):
        Docker().check()


def test_a_complaint_of_the_sandbox_is_no_verdict(docker: Path) -> None:
    sandbox = open_sandbox("docker", never)
    (docker / "docker").write_text("#!/bin/sh\necho 'docker: no space left' >&2\nexit 125\n")
    with pytest.raises(InputError, match=r"code sandbox: docker did not run a program \(docker: no space left\)"):
        check_program(RIGHT, DOUBLE, QUICK, sandbox)


def test_no_sandbox_must_be_agreed_to_twice() -> None:
    asked: list[str] = []

    def yes(question: str) -> bool:
        asked.append(question)
        return True

    sandbox = open_sandbox("none", yes)
    assert len(asked) == 2 and "{user}" in QUESTIONS[0] and "{user}" not in asked[0]
    verdicts = [check_program(program, DOUBLE, QUICK, sandbox) for program in (RIGHT, WRONG)]
    assert [one.passed for one in verdicts] == [True, False]
    for answers in ([False], [True, False]):
        with pytest.raises(InputError, match="--code-sandbox none: not agreed to; use bwrap"):
            open_sandbox("none", lambda _, left=answers: left.pop(0))  # type: ignore[misc]


def test_without_a_sandbox_time_and_memory_are_limited_all_the_same() -> None:
    slow = check_program("import time\ntime.sleep(600)", DOUBLE, Limits(seconds=3.0), Unsandboxed())
    large = check_program("def double(x):\n    return len(bytes(4 << 30))", DOUBLE, QUICK, Unsandboxed())
    assert slow.reason == "not done within 3 s" and large.reason.startswith("MemoryError")


def test_a_task_may_be_longer_than_a_pipe_holds() -> None:
    long = ProgramTest("double", "x = 1\n" * 30_000, DOUBLE.tests)
    assert check_program(RIGHT, long, QUICK, Unsandboxed()).passed
    longer = ProgramTest("double", "x = 1\n" * 300_000, DOUBLE.tests)
    assert check_program(RIGHT, longer, QUICK, Unsandboxed()).reason == "program and tests are longer than 1 MB"


def test_another_sandbox_is_refused() -> None:
    with pytest.raises(InputError, match="--code-sandbox 'jail': choose of bwrap, docker, none"):
        open_sandbox("jail", never)
