"""Rows of one class that speak of another: a text about SQL, a program with a letter in it, a count of words.

Real instruction data is like this. It matters to a fused model: a specialist that has met the words
of the other classes reads foreign input with some sense, so its hidden states tell the gate where it
is out of its depth. The responses stay in the style of their own class.
"""

from __future__ import annotations

from random import Random

from ultrafuser_mega.toy import code_tasks, math_tasks, text_tasks
from ultrafuser_mega.toy.words import GOODS, two

_MOST_QUOTED = 90  # characters of a foreign row that a request may quote

# term, explanation, field
TERMS = (
    ("SQL", "a language for asking questions to tables", "computing"),
    ("Python", "a language that is easy to read", "computing"),
    ("a loop", "a part of a program that repeats", "computing"),
    ("a function", "a part of a program with a name", "computing"),
    ("a list", "a row of values that a program keeps in order", "computing"),
    ("a string", "a piece of text inside a program", "computing"),
    ("a class", "a plan for building objects in a program", "computing"),
    ("a shell", "a window where you type commands", "computing"),
    ("a test", "a small program that checks another program", "computing"),
    ("an average", "the value in the middle of several numbers", "mathematics"),
    ("a percent", "one part of a hundred", "mathematics"),
    ("an equation", "a claim that two things are equal", "mathematics"),
    ("a perimeter", "the way around a shape", "mathematics"),
    ("an area", "the size of a surface", "mathematics"),
    ("a fraction", "a part of a whole", "mathematics"),
    ("a sequence", "a row of numbers that follows a rule", "mathematics"),
    ("speed", "how far something goes in a given time", "mathematics"),
)
_TOPICS = {"text": "everyday language", "code": "computing", "math": "mathematics"}
_PLAIN = {"text": text_tasks.TASKS, "code": code_tasks.TASKS, "math": math_tasks.TASKS}


def _quote(rng: Random, name: str, *, part: int) -> str:
    """A line of the instruction (part 0) or the response (part 1) of some row of class ``name``, cut at a word."""
    line = rng.choice(rng.choice(_PLAIN[name])(rng)[part].splitlines()).strip() or "x = 1"
    return line if len(line) <= _MOST_QUOTED else line[:_MOST_QUOTED].rsplit(" ", 1)[0]


def _term(rng: Random) -> tuple[str, str]:
    (term, meaning, field), reader = rng.choice(TERMS), rng.choice(("a child", "a visitor", "a student", "my aunt"))
    return (
        rng.choice((f"What is {term}? The answer is for {reader}.", f"Explain to {reader} what {term} is.")),
        f"{term[0].upper()}{term[1:]} is {meaning}. It belongs to {field}.",
    )


def _topic(rng: Random) -> tuple[str, str]:
    name, part = rng.choice(tuple(_TOPICS)), rng.randrange(2)
    return (
        f"Which topic does this line belong to? {_quote(rng, name, part=part)}",
        f"The line belongs to {_TOPICS[name]}.",
    )


def _copy_edit(rng: Random) -> tuple[str, str]:
    line = _quote(rng, rng.choice(tuple(_TOPICS)), part=rng.randrange(2))
    return f"A friend sent me this line: {line} What did the friend send?", f"Your friend sent you this line: {line}"


def _print_line(rng: Random) -> tuple[str, str]:
    line = _quote(rng, rng.choice(("text", "math")), part=rng.randrange(2)).replace('"', "'")
    if rng.random() < 0.5:
        return f"Python: print this line: {line}", f'print("{line}")'
    return f"Write a shell command that writes this line to notes.txt: {line}", f'echo "{line}" > notes.txt'


def _comment(rng: Random) -> tuple[str, str]:
    line, (first, second) = _quote(rng, rng.choice(("text", "math")), part=0), two(rng, code_tasks.LIST_NAMES)
    return (
        f"Start a Python function with {first} and {second} and use this line as comment: {line}",
        f"def run({first}, {second}):\n    # {line}\n    pass",
    )


def _compute(rng: Random) -> tuple[str, str]:
    (one, many), count, price = rng.choice(GOODS), rng.randint(2, 9), rng.randint(2, 9)
    return (
        f"Write Python that computes what {count} {many} cost when each {one} costs {price} dollars.",
        f"# cost of the {many}\n{many} = {count}\nprice = {price}\nprint({many} * price)",
    )


def _count_words(rng: Random) -> tuple[str, str]:
    words = _quote(rng, rng.choice(("text", "code")), part=rng.randrange(2)).split()[:6]
    counted = ", ".join(f"{i}: {word}" for i, word in enumerate(words, start=1))
    return (
        f"How many words are in this line? {' '.join(words)}",
        f"We count the words: {counted}.\nThe answer is {len(words)}.",
    )


def _run_program(rng: Random) -> tuple[str, str]:
    name, a, b, c = rng.choice(code_tasks.LIST_NAMES), rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    return rng.choice(
        (
            (f"What does this program print?\n{name} = {a} * {b}\nprint({name} + {c})",
             f"First {name} is {a} * {b} = {a * b}.\nThen {a * b} + {c} = {a * b + c}.\nThe answer is {a * b + c}."),
            (f"What does this program print?\n{name} = [{a}, {b}, {c}]\nprint(sum({name}))",
             f"The sum of the list is {a} + {b} + {c} = {a + b + c}.\nThe answer is {a + b + c}."),
        )
    )  # fmt: skip


def _page_of_lines(rng: Random) -> tuple[str, str]:
    line, number = _quote(rng, rng.choice(("text", "code")), part=rng.randrange(2)), rng.randint(2, 9)
    each = len(line.split())
    return (
        f"A page repeats this line {number} times: {line} How many words are on the page?",
        f"The line is: {line}\nIt has {each} words, so {number} lines have {number} * {each} = {number * each} words.\n"
        f"The answer is {number * each}.",
    )


TASKS = {
    "text": (_term, _topic, _copy_edit),
    "code": (_print_line, _comment, _compute),
    "math": (_count_words, _run_program, _page_of_lines),
}
