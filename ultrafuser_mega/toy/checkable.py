"""Tasks whose replies can be checked: held-out instructions of the toy classes, with what makes a reply right.

    {"id": "math-007", "instruction": ..., "check": {"kind": "number", "answer": "54"}}
    {"id": "text-007", "instruction": ..., "check": {"kind": "exact", "answer": "Hanoi is a city in Vietnam."}}
    {"id": "code-007", "instruction": ..., "check": {"kind": "program", "entry_point": "sum_even", "tests": ...}}

``tests`` defines ``check(candidate)``, as HumanEval's do, and raises where ``candidate`` answers otherwise than the
class's own response. The instructions come from the grammars of the training rows, of which they are none: what a
number comes to and what a program does follow from the instruction, and a text task is asked where one reply is right.
The names of functions are those that the training rows give to functions of their kind.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy import code_tasks, crossing_tasks, math_tasks, text_tasks

Grammar = Callable[[Random], tuple[str, str]]

_TRIES_PER_ROW = 200
_GRAMMARS: dict[str, tuple[Grammar, ...]] = {
    "text": tuple(
        task for task in text_tasks.TASKS + crossing_tasks.TASKS["text"] if task not in text_tasks.MANY_REPLIES
    ),
    "code": code_tasks.TASKS,
    "math": math_tasks.TASKS + crossing_tasks.TASKS["math"],
}
# What a function is called with, by its parameters.
_LISTS = (([3, -2, 8, 0, 5, -7],), ([4, 1, -9, 6, 2, 0, 11],), ([10, -4, 7, 7, -1, 2],))
_TEXTS = (
    ("level",),
    ("Level",),
    ("Hello World",),
    ("12345",),
    ("a few short words",),
    ("  two spaces ",),
    ("first\nsecond line",),
)
_PAIRS = ((7, 3), (2, 9), (-4, 5))


@dataclass(frozen=True)
class Task:
    """An instruction, and how its reply is checked, as the module's docstring has it."""

    id: str
    instruction: str
    check: dict[str, str]


def make_tasks(name: str, *, seed: int, rows: int, taken: Collection[str]) -> tuple[Task, ...]:
    """Tasks of class ``name``, none of whose instructions is ``taken``; a pure function of its arguments.

    Raises:
        InputError: the grammar of this class has not that many left.
    """
    rng = Random(f"{name}-{seed}-tasks")
    found: dict[str, Task] = {}
    for _ in range(_TRIES_PER_ROW * rows):
        if len(found) == rows:
            break
        instruction, output = rng.choice(_GRAMMARS[name])(rng)
        if instruction in taken or instruction in found:
            continue
        if (check := _CHECKS[name](instruction, output)) is not None:
            found[instruction] = Task(f"{name}-{len(found):03}", instruction, check)
    if len(found) < rows:
        raise InputError(f"task_rows = {rows}: the {name} grammar gave only {len(found)}; ask for at most that many")
    return tuple(found.values())


def write_tasks(path: Path, tasks: Collection[Task]) -> None:
    """Write one JSON object per line."""
    lines = (json.dumps(asdict(task), ensure_ascii=False) for task in tasks)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _text(instruction: str, output: str) -> dict[str, str]:
    return {"kind": "exact", "answer": output}


def _math(instruction: str, output: str) -> dict[str, str] | None:
    found = re.search(r"The answer is (-?\d+)\.$", output)
    return {"kind": "number", "answer": found[1]} if found else None


def _code(instruction: str, output: str) -> dict[str, str] | None:
    """Of an answer that is one function which returns something."""
    try:
        (function,) = ast.parse(output).body
    except (SyntaxError, ValueError):  # SQL, shell, words; more than one statement
        return None
    if not isinstance(function, ast.FunctionDef) or not isinstance(function.body[-1], ast.Return):
        return None
    space: dict[str, Any] = {}
    exec(compile(output, "answer", "exec"), space)  # of our own grammar
    lines = [_assertion(space[function.name], arguments) for arguments in _calls(function, instruction)]
    tests = "def check(candidate):\n" + "".join(f"    {line}\n" for line in lines)
    return {"kind": "program", "entry_point": function.name, "tests": tests}


def _calls(function: ast.FunctionDef, instruction: str) -> tuple[tuple[Any, ...], ...]:
    names = [argument.arg for argument in function.args.args]
    if names == ["text"]:
        return (*_TEXTS, ("",)) if "empty" in instruction else _TEXTS
    return _LISTS if len(names) == 1 else _PAIRS


def _assertion(answer: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    call = f"candidate({', '.join(map(repr, arguments))})"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return f"assert {call} == {answer(*arguments)!r}"
    except ValueError:
        return f"try: {call}\n    except Exception: pass\n    else: raise AssertionError('no error from {call}')"


_CHECKS: dict[str, Callable[[str, str], dict[str, str] | None]] = {"text": _text, "code": _code, "math": _math}
