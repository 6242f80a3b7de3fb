"""HumanEval's prompts as instructions, and the programs that replies hold."""

from __future__ import annotations

import pytest

from ultrafuser_mega.evaluation.benchmarks.humaneval import Problem, find_program, split_prompt

PROMPT = '''import math


def root(x):
    """Helps."""
    return math.sqrt(x)


def longest(xs: list,
            y: float = 1.0) -> float:
    """ The longest of
    them all.
      more
    """
'''
HEADER = PROMPT[: PROMPT.index("def longest")].rstrip()
BODY = "    y = 2\n    if xs:\n        return max(xs)\n    return y"
WHOLE = f"def longest(xs, y=1.0):\n{BODY}"


def test_a_prompt_becomes_an_instruction() -> None:
    assert split_prompt(PROMPT, "longest") == Problem(
        "longest(xs: list,\n            y: float = 1.0) -> float", "The longest of\nthem all.\n  more"
    )


def test_a_docstring_may_stand_behind_an_import() -> None:
    prompt = 'def fill(grid):\n    import math\n    """\n    Fill it.\n    """\n'
    assert split_prompt(prompt, "fill") == Problem("fill(grid)", "Fill it.")


@pytest.mark.parametrize("prompt", ["def other():\n    '''x'''\n", "def f():\n", "def f():\n    return 1\n"])
def test_a_prompt_without_its_function_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt (defines no function|has no docstring for) 'f'"):
        split_prompt(prompt, "f")


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        (f"```python\n{WHOLE}\n```", "fenced function"),
        (f"Sure!\n\n```\n{WHOLE}\n```\nIt works.", "fenced function"),
        (f"```python\n{WHOLE}", "fenced function"),
        (f"Use it so:\n```\nlongest([1])\n```\nand\n```py\n{WHOLE}\n```", "fenced function"),
        (f"  ```python\n  {WHOLE.replace(chr(10), chr(10) + '  ')}\n  ```", "fenced function"),
        (f"```python\n{BODY}\n```", "fenced body"),
        (f"```python\n{PROMPT}{BODY}\n```", "fenced function"),
        (WHOLE, "text function"),
        (f"Here is it:\n\n{WHOLE}\n\nThis returns the longest.", "text function"),
        (f"import os\n{WHOLE}\n", "text function"),
        (PROMPT + BODY, "text function"),
        (BODY, "text body"),
        (BODY.strip(), "text body"),
        (f"{BODY}\n\nThat is all, isn't it?", "text body"),
        ("\n".join(line[4:] for line in BODY.splitlines()), "text body"),
    ],
)
def test_programs_in_replies(reply: str, rule: str) -> None:
    found = find_program(reply, PROMPT, "longest")
    assert found is not None and found[1] == rule
    space: dict[str, object] = {}
    exec(found[0], space)
    longest, root = space["longest"], space["root"]
    assert callable(longest) and callable(root)
    assert (longest([1, 7, 3]), longest([]), root(4)) == (7, 2, 2.0)


@pytest.mark.parametrize("reply", ["I cannot do that.", "```\nlongest?\n```", "def longest(xs:\n", "-" * 100_000 + "1"])
def test_what_is_no_program_stays_as_it_is(reply: str) -> None:
    found = find_program(reply, PROMPT, "longest")
    assert found is not None and found[1].endswith("neither function nor body")


def test_an_empty_reply_holds_no_program() -> None:
    assert find_program(" \n", PROMPT, "longest") is None


def test_a_program_that_writes_its_own_helper_keeps_it() -> None:
    reply = f"```\ndef root(x):\n    return -1\n\n{WHOLE}\n```"
    found = find_program(reply, PROMPT, "longest")
    assert found is not None
    assert found[0].startswith(HEADER) and found[0].rindex("return -1") > found[0].index("math.sqrt")
