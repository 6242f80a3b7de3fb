"""Programs that a model wrote: right ones pass, wrong ones do not, none gets out of its sandbox or past its tests."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.bubblewrap import Bubblewrap
from ultrafuser_mega.evaluation.programs import ProgramTest, check_program
from ultrafuser_mega.evaluation.sandbox import Limits

SETUP = "def scale(x):\n    return 2 * x\n\ndef double(x):\n    '''Twice x.'''\n"
TESTS = "def check(candidate):\n    for x in (0, 3, -5):\n        assert candidate(x) == scale(x), f'of {x}'\n"
DOUBLE = ProgramTest("double", SETUP, TESTS)
QUICK = Limits(
    seconds=60.0, cpu_seconds=2, memory_bytes=512 << 20
)  # by the clock much, for machines that do other work


@pytest.fixture(autouse=True, scope="module")
def _sandbox() -> None:
    try:
        Bubblewrap().check()
    except InputError as error:
        pytest.skip(str(error))


def judged(body: str, test: ProgramTest = DOUBLE, limits: Limits = QUICK) -> tuple[bool, str]:
    """What the tests say of a function ``double(x)`` with this body."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    verdict = check_program(f"def double(x):\n{lines}", test, limits)
    return verdict.passed, verdict.reason


@pytest.mark.parametrize("body", ["return x * 2", "print('noise'); return x + x", "return int(str(2 * x))"])
def test_a_right_program_passes(body: str) -> None:
    assert judged(body) == (True, "")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return x", "wrong answer of 3"),
        ("return None", "wrong answer of 0"),
        ("return 1 // 0", "ZeroDivisionError: integer division or modulo by zero"),
        ("return undefined", "NameError: name 'undefined' is not defined"),
        ("raise SystemExit", "Exception: "),
        ("return double(x)", "RecursionError: maximum recursion depth exceeded"),
        ("return (y for y in [2 * x])", "TypeError: double returned what is no plain data"),
    ],
)
def test_a_wrong_program_fails_with_its_reason(body: str, reason: str) -> None:
    assert judged(body) == (False, reason)


def test_a_program_without_its_function_or_syntax_fails() -> None:
    assert check_program("def treble(x): return 3 * x", DOUBLE, QUICK).reason == "KeyError: 'double'"
    assert check_program("def double(x) return", DOUBLE, QUICK).reason.startswith("SyntaxError: ")


@pytest.mark.parametrize(
    "cheat",
    [
        "import os; os._exit(0)",
        "import os; os.write(1, b'{\"passed\": true}'); os._exit(0)",
        "import builtins; builtins.AssertionError = Exception; return None",
        "class Same(int):\n    def __eq__(self, other): return True\nreturn Same(1)",
        "class Same:\n    def __eq__(self, other): return True\nreturn Same()",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"passed\": true}')\n"
        "    except OSError: pass\nos._exit(0)",
        "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Channel': o.send(('value', 1))\n"
        "return None",
        "class Act:\n    def __reduce__(self): return (exec, ('import os; os._exit(0)',))\nreturn Act()",
        "return 'x' * (100 << 20)",
    ],
    ids=[
        "exit 0",
        "print a pass",
        "patch assert",
        "equal int",
        "equal object",
        "all files",
        "speak",
        "pickle",
        "flood",
    ],
)
def test_a_cheat_does_not_pass(cheat: str) -> None:
    assert not judged(cheat)[0]


#: Each returns twice x, which is right, if it gets out; so "not passed" or the wall's error says that it did not.
ESCAPES = {
    "reads home": "import os\nassert set(os.listdir(HOME)) - {PYTHON}\nreturn 2 * x",
    "reads a file": "open(SECRET).read(); return 2 * x",
    "reads passwords": "open('/etc/passwd').read(); return 2 * x",
    "writes outside": "open('/usr/escaped', 'w').write('x'); return 2 * x",
    "writes beside": "open('/escaped', 'w').write('x'); return 2 * x",
    "remounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0\nreturn 2 * x",
    "new user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nreturn 2 * x",
    "forks": "import os\nif os.fork() == 0: os._exit(0)\nreturn 2 * x",
    "runs a command": "import subprocess; subprocess.run(['/bin/true'], check=True); return 2 * x",
    "kills its parent": "import os\nassert os.getppid() > 1\nos.kill(os.getppid(), 9)\nreturn 2 * x",
    "kills everyone": "import os, signal\nos.kill(-1, signal.SIGKILL)\nreturn 2 * x",
    "takes 10 GB": "b = bytearray(10 << 30); return 2 * x",
    "fills the disk": "f = open('/tmp/big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))\nreturn 2 * x",
    "fills memory by files": "for i in range(64):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\nreturn 2 * x",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\nreturn 2 * x",
    "sees other processes": "import os\nassert sum(n.isdigit() for n in os.listdir('/proc')) > 3\nreturn 2 * x",
    "shared memory": "open('/dev/shm/x', 'w').write('x'); return 2 * x",
    "loops": "while True: pass",
}  # fmt: skip


@pytest.mark.parametrize("escape", ESCAPES)
def test_nothing_gets_out(escape: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    home = Path.home()
    prefix = Path(sys.base_prefix)
    python = prefix.relative_to(home).parts[0] if prefix.is_relative_to(home) else ""  # which has to be seen
    facts = {"HOME": repr(str(home)), "PYTHON": repr(python), "SECRET": repr(str(tmp_path / "secret"))}
    body = ESCAPES[escape]
    for name, value in facts.items():
        body = body.replace(name, value)
    assert judged(body)[0] is False


def test_nothing_reaches_a_server_of_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        body = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2); return 2 * x"
        passed, reason = judged(body)
    assert not passed and reason.startswith(("OSError", "ConnectionRefusedError", "Exception"))


def test_a_program_that_only_waits_ends_with_its_time() -> None:
    passed, reason = judged("import time; time.sleep(999)", limits=Limits(seconds=3.0))
    assert (passed, reason) == (False, "not done within 3 s")


def test_threads_may_start() -> None:
    body = "import threading\nt = threading.Thread(target=lambda: None)\nt.start()\nt.join()\nreturn 2 * x"
    assert judged(body) == (True, "")


def test_many_at_once_leave_no_process_behind() -> None:
    bodies = ["return 2 * x", "while True: pass", "import os; os._exit(0)", "import time; time.sleep(99)"] * 2
    limits = Limits(seconds=5.0, cpu_seconds=1)
    threads = [threading.Thread(target=judged, args=(body, DOUBLE, limits)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(_children()) == []


def _children() -> Iterator[str]:
    """Commands of this process's living children."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"bwrap" in (command := Path(f"/proc/{pid}/cmdline").read_bytes()):
                yield command.decode()


def test_without_bubblewrap_the_refusal_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"code sandbox: no bwrap on the PATH; install bubblewrap \(apt"):
        check_program("", DOUBLE)


def test_a_bubblewrap_that_may_not_work_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(InputError, match=r"bwrap starts nothing here \(bwrap: No permissions to create"):
        check_program("", DOUBLE)
