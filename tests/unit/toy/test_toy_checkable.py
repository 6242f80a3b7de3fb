"""Tasks with checkable replies: held out, asked where one reply is right, and checks that tell right from wrong."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy import checkable, code_tasks
from ultrafuser_mega.toy.corpus import CLASSES, generate


def passes(program: str, check: dict[str, str]) -> bool:
    """Whether the tests accept a program, which here is one of ours."""
    space: dict[str, Any] = {}
    exec(program, space)
    exec(check["tests"], space)
    try:
        space["check"](space[check["entry_point"]])
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", CLASSES)
def test_no_task_has_an_instruction_of_the_rows_and_the_same_seed_gives_the_same_tasks(name: str) -> None:
    split = generate(name, seed=0, train_rows=4000, heldout_rows=200)
    taken = {row.instruction for row in split.train + split.heldout}
    tasks = checkable.make_tasks(name, seed=0, rows=100, taken=taken)
    assert len({task.instruction for task in tasks} - taken) == len({task.id for task in tasks}) == 100
    assert tasks == checkable.make_tasks(name, seed=0, rows=100, taken=taken)
    assert tasks != checkable.make_tasks(name, seed=1, rows=100, taken=taken)


@pytest.mark.parametrize(
    "grammar", [g for name in CLASSES for g in checkable._GRAMMARS[name]], ids=lambda g: g.__name__
)
def test_an_instruction_has_one_reply(grammar: checkable.Grammar) -> None:
    rng, replies = Random(0), dict[str, str]()
    for _ in range(1000):
        instruction, reply = grammar(rng)
        assert replies.setdefault(instruction, reply) == reply


def test_the_number_is_the_one_that_the_steps_come_to() -> None:
    output = "We count the words: 1: buy, 2: 30.\nThe answer is 2."
    assert checkable._math("How many words?", output) == {"kind": "number", "answer": "2"}


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (code_tasks._aggregate, "if x", "if not x"),
        (code_tasks._aggregate, "chosen = [", "chosen = [99, -98] + ["),
        (code_tasks._string, "return text", "return 'x' + text"),
        (code_tasks._string, "raise ValueError", "return ValueError"),
        (code_tasks._fix, "    return ", "    return 1 + "),
        (code_tasks._mapping, "result.append(", "result.append(1) or result.append("),
    ],
)
def test_tests_of_a_program_pass_the_class_s_own_reply_and_no_other(
    grammar: checkable.Grammar, right: str, wrong: str
) -> None:
    rng, seen = Random(0), 0
    for _ in range(400):
        instruction, output = grammar(rng)
        if (check := checkable._code(instruction, output)) is not None and right in output:
            assert passes(output, check)
            assert not passes(output.replace(right, wrong, 1), check), output
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("output", ["SELECT name\nFROM users;", "print(3)", "x = 1\ny = 2", "def f(a):\n    pass"])
def test_what_is_no_function_that_returns_something_is_no_task(output: str) -> None:
    assert checkable._code("Do it.", output) is None


def test_more_tasks_than_the_grammar_has_left_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkable._GRAMMARS, "code", (code_tasks._fix,))
    with pytest.raises(InputError, match=r"^task_rows = 1000: the code grammar gave only 360; ask for at most"):
        checkable.make_tasks("code", seed=0, rows=1000, taken=())
