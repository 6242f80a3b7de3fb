"""Random programs that define ``double(x)``: loops, forks, memory, exits, prints, files, recursion, syntax errors.

Each is some of SNIPPETS, at the module's top or in the function, and an ending that is right (returns 2 x) or wrong;
now and then a few of its characters are changed. The seed decides all of it.
"""

# ruff: noqa: E501

from __future__ import annotations

import random
import textwrap

SNIPPETS = {
    "arithmetic": "y = sum(i * i for i in range(2000))",
    "sorting": "y = sorted(range(5000), key=lambda i: -i)",
    "print": "print('[[10]] passed', {'passed': True})",
    "print much": "import sys\nsys.stdout.write('x' * 1_000_000)",
    "write raw": "import os\nfor fd in range(3, 12):\n    try: os.write(fd, b'\\x00' * 64)\n    except OSError: pass",
    "close all": "import os\nos.closerange(0, 64)",
    "exit": "raise SystemExit(0)",
    "hard exit": "import os\nos._exit(0)",
    "abort": "import os\nos.abort()",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "interrupt": "raise KeyboardInterrupt",
    "raise": "raise ValueError('no' * 1000)",
    "kill itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "kill everyone": "import os, signal\ntry: os.kill(-1, signal.SIGKILL)\nexcept OSError: pass",
    "stop itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "deaf": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass",
    "alarm": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.001)",
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(999)",
    "fork": "import os\ntry: os.fork()\nexcept OSError: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: break",
    "orphan": "import os\ntry:\n    if os.fork() == 0:\n        os.setsid()\n        while True: pass\nexcept OSError: pass",
    "command": "import subprocess\ntry: subprocess.Popen(['sleep', '999'])\nexcept OSError: pass",
    "exec": "import os\ntry: os.execv('/bin/sleep', ['sleep', '999'])\nexcept OSError: pass",
    "process pool": "import multiprocessing\ntry: multiprocessing.Process(target=print).start()\nexcept OSError: pass",
    "threads": "import threading\nfor _ in range(20): threading.Thread(target=lambda: None).start()",
    "busy threads": "import threading\ndef spin():\n    while True: pass\nfor _ in range(4): threading.Thread(target=spin, daemon=True).start()",
    "waiting thread": "import threading\nthreading.Thread(target=threading.Event().wait).start()",
    "memory": "b = bytes(1 << 34)",
    "memory bit by bit": "b = []\nwhile True: b.append(bytes(1 << 22))",
    "much memory": "b = [bytearray(1 << 20) for _ in range(60)]",
    "recursion": "def deep(n): return deep(n + 1)\ndeep(0)",
    "recursion without limit": "import sys\nsys.setrecursionlimit(10**9)\ndef deeper(n): return deeper(n + 1)\ndeeper(0)",
    "big number": "y = len(str(pow(7, 60_000)))",
    "file": "open('/tmp/a', 'w').write('x' * 1000)",
    "big file": "f = open('/tmp/b', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20))",
    "many files": "for i in range(300): open(f'/tmp/c{i}', 'w').close()",
    "open files": "f = [open('/dev/null') for _ in range(200)]",
    "write outside": "try: open('/usr/x', 'w').write('x')\nexcept OSError: pass",
    "read outside": "try: open('/etc/shadow').read()\nexcept OSError: pass",
    "socket": "import socket\ntry: socket.create_connection(('127.0.0.1', 80), 0.1)\nexcept OSError: pass",
    "listen": "import socket\ns = socket.socket()\ntry: s.bind(('127.0.0.1', 0)); s.listen()\nexcept OSError: pass",
    "import": "import antigravity_that_is_not_there",
    "heavy import": "import asyncio, decimal, json, unittest",
    "patch pickle": "import pickle\npickle.dumps = None",
    "patch builtins": "import builtins\nbuiltins.len = None\nbuiltins.AssertionError = Exception",
    "at exit": "import atexit, time\natexit.register(time.sleep, 999)",
    "finalizer": "class D:\n    def __del__(self):\n        while True: pass\nd = D()",
    "trace": "import sys\nsys.settrace(lambda *a: None)",
    "mmap": "import mmap\nm = mmap.mmap(-1, 1 << 26)\nm.write(b'x' * 1000)",
    "priority": "import os\ntry: os.nice(-5)\nexcept OSError: pass",
    "limits": "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))\nexcept (OSError, ValueError): pass",
    "no bytes": "import sys\nsys.stdin.read()",
    "read pipe": "import os\ntry: os.read(0, 1 << 20)\nexcept OSError: pass",
    "speak": "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Channel': o.send(('value', 6))",
    "flood": "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Channel':\n        for _ in range(100): o.send(('value', 'x' * 100_000))",
    "listen to tests": "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Channel': o.receive()",
}  # fmt: skip
#: These take all of a program's time; drawn more rarely, or a run would do little else.
SLOW = ("loop", "sleep", "stop itself", "exec", "waiting thread", "finalizer", "memory bit by bit", "listen to tests",
        "recursion without limit", "busy threads", "at exit")  # fmt: skip

RIGHT = ("return 2 * x", "return x + x", "return int(str(x)) * 2")
WRONG = ("return x", "return None", "return str(2 * x)", "return 2 * x + 1", "yield 2 * x", "pass", "return [2 * x]",
         "return {'passed': True}", "return double(x)", "return 'x' * (1 << 20)", "return object()")  # fmt: skip


def random_program(seed: int) -> tuple[str, bool]:
    """A program, and whether it may be right: no program that may not may pass ``2 * x``."""
    drawn = random.Random(seed)
    names = [name for name in SNIPPETS if name not in SLOW or drawn.random() < 0.08]
    top, inner = (drawn.sample(names, drawn.choice((0, 0, 1, 1, 2, 3))) for _ in range(2))
    may_be_right = drawn.random() < 0.4
    ending = drawn.choice(RIGHT if may_be_right else WRONG)
    body = "\n".join([*(SNIPPETS[name] for name in inner), ending])
    program = "\n".join([*(SNIPPETS[name] for name in top), "def double(x):", textwrap.indent(body, "    ")])
    if drawn.random() < 0.1:
        for _ in range(drawn.randint(1, 3)):
            at = drawn.randrange(len(program))
            program = program[:at] + drawn.choice(("", "(", ")", " ", "\n", '"', "\x00", "\u00e9")) + program[at + 1 :]
        may_be_right = True  # who knows
    return program, may_be_right
