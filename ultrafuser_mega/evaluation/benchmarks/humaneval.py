"""HumanEval (Chen et al. 2021) as instructions: InstructHumanEval's conversion, pass@1 by running the tests.

codeparrot/instructhumaneval makes of a prompt's signature and docstring "Write a function SIGNATURE to solve the
following problem:", then the docstring; the model is not shown the imports and helpers before the function (the
harness's "nocontext" task), which are put back when its program runs.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ultrafuser_mega.evaluation.benchmark import Item, Score
from ultrafuser_mega.evaluation.benchmarks.files import JsonlBenchmark
from ultrafuser_mega.evaluation.programs import ProgramTest, Verdict, check_program

#: Judges a program by a benchmark's tests.
ProgramCheck = Callable[[str, ProgramTest], Verdict]

_MOST = 20_000  # characters of a program: Python's parser survives whatever stands in so few
_MOST_LINES = 300  # of a text without a fence, each of which may be its last line of code
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|```|\Z)", re.DOTALL)
_CODE_LINE = re.compile(r"^(?:from|import|def|async def|class|@)[\s\w]", re.MULTILINE)


class HumanEval(JsonlBenchmark):
    """The program that the reply holds must pass the problem's tests.

    Args:
        check: runs them.
    """

    name = "humaneval"
    title = "HumanEval"
    domain = "code"
    metric = "Pass@1"
    source = "HumanEval.jsonl.gz"
    origin = "https://github.com/openai/human-eval, data/HumanEval.jsonl.gz"
    max_new_tokens = 512
    runs_programs = True
    fields = {"task_id": str, "prompt": str, "entry_point": str, "test": str}  # noqa: RUF012

    def __init__(self, check: ProgramCheck = check_program) -> None:
        self._check = check

    def item(self, row: dict[str, Any], number: int) -> Item:
        problem = split_prompt(row["prompt"], row["entry_point"])
        ask = f"Write a function {problem.signature} to solve the following problem:\n{problem.docstring}"
        return Item(row["task_id"], (ask,), {name: row[name] for name in ("prompt", "entry_point", "test")})

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        reference = item.reference
        test = ProgramTest(reference["entry_point"], reference["prompt"], reference["test"])
        return program_score(replies[0], test, self._check)


def program_score(reply: str, test: ProgramTest, check: ProgramCheck) -> Score:
    """1 where the program that ``reply`` holds passes ``test``; ``test.setup`` is the prompt that it completes."""
    found = find_program(reply, test.setup, test.entry_point)
    if found is None:
        return Score(0.0, None, "no program")
    program, rule = found
    verdict = check(program, test)
    return Score(float(verdict.passed), program, rule if verdict.passed else f"{rule}; {verdict.reason}")


@dataclass(frozen=True)
class Problem:
    """A HumanEval prompt, cut up.

    signature: "name(a: int) -> int".
    docstring: its lines, without the indentation.
    """

    signature: str
    docstring: str


def split_prompt(prompt: str, entry_point: str) -> Problem:
    """The parts of a prompt: a module that ends in the function to write.

    Raises:
        ValueError: it is no such module.
    """
    function = _function(prompt, entry_point)
    if function is None:
        raise ValueError(f"prompt defines no function {entry_point!r} that Python can read")
    lines = prompt.splitlines(keepends=True)
    head = "".join(lines[function.lineno - 1 : function.body[0].lineno])
    found = re.match(r"def\s+(.*?)\s*:\s*(?:\n|$)", head, re.DOTALL)
    texts = [
        line.value.value
        for line in function.body
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
    ]
    if found is None or not texts:
        raise ValueError(f"prompt has no docstring for {entry_point!r}")
    return Problem(found[1], inspect.cleandoc(texts[0]))


def find_program(reply: str, prompt: str, entry_point: str) -> tuple[str, str] | None:
    """(program, by which rule) in a reply; None where there is none.

    "fenced": the first fenced block that defines the function, else the first; "text": without a fence, from the first
    line of code as far as it can be read. Then "function": it defines the entry point, and the prompt's imports and
    helpers are put before it; "body": it does not, and completes the prompt; "neither".
    """
    blocks = [block for block in _FENCE.findall(reply) if block.strip()]
    defines = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    if blocks:
        where, code = "fenced", next((block for block in blocks if defines.search(block)), blocks[0])[:_MOST]
        readings = [code]
    elif reply.strip():
        where, code = "text", reply[:_MOST]
        begin = _CODE_LINE.search(code)
        readings = [*_beginnings(code[begin.start() :] if begin else ""), *_beginnings(code)]
    else:
        return None
    for reading in readings:
        if _function(whole := textwrap.dedent(reading), entry_point) is not None:
            header = _header(prompt, entry_point).rstrip()
            return f"{header}\n\n\n{whole}" if header else whole, f"{where} function"
    for reading in readings:
        if (completed := _completed(prompt, reading, entry_point)) is not None:
            return completed, f"{where} body"
    return code, f"{where}, neither function nor body"


def _beginnings(text: str) -> list[str]:
    """All that the text begins with, by lines, the longest first."""
    lines = text.strip("\n").splitlines()[:_MOST_LINES]
    return ["\n".join(lines[:end]) for end in range(len(lines), 0, -1)]


def _header(prompt: str, entry_point: str) -> str:
    """What stands before the function: imports, helpers."""
    function = _function(prompt, entry_point)
    return "".join(prompt.splitlines(keepends=True)[: function.lineno - 1]) if function else ""


def _completed(prompt: str, body: str, entry_point: str) -> str | None:
    """The prompt with the function's body behind it, whose indentation may have got lost, in all or in its first line;
    None where that is no function."""
    body = body.strip("\n")
    first, _, rest = body.partition("\n")
    whole = textwrap.indent(textwrap.dedent(body), "    ")
    for reading in (body, whole, f"    {first.strip()}\n{rest}"):
        if not reading.startswith((" ", "\t")):
            continue
        completed = f"{prompt.rstrip()}\n{reading}\n"
        function, tree = _function(completed, entry_point), _parse(completed)
        if function is not None and tree is not None and (reading is body or tree.body[-1].lineno == function.lineno):
            return completed
    return None


def _function(source: str, name: str) -> ast.FunctionDef | None:
    """The last definition of ``name`` at a module's top; None where there is none."""
    tree = _parse(source)
    found = [line for line in tree.body if isinstance(line, ast.FunctionDef) and line.name == name] if tree else []
    return found[-1] if found else None


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
