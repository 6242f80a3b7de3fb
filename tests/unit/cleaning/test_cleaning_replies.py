"""Each rule of single replies on what it is for, and on what only looks like it."""

from __future__ import annotations

import pytest

from ultrafuser_mega.cleaning.replies import find_in_replies
from ultrafuser_mega.cleaning.rules import Finding, Rules
from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.errors import InputError


def found(question: str, reply: str, rules: Rules | None = None) -> Finding | None:
    return find_in_replies(Conversation(((question, reply),)), rules or Rules())


@pytest.mark.parametrize(
    ("rule", "question", "reply"),
    [
        ("length", "What is it?", "?!"),
        ("refusal", "Who won?", "I'm sorry, but I can't provide that."),
        ("refusal", "Who won?", "I’m sorry, but I am unable to answer."),  # noqa: RUF001
        ("refusal", "Who won?", "As an AI assistant, I do not follow sports."),
        ("refusal", "Who won?", "I cannot help with that."),
        (
            "boilerplate",
            "Tell me a joke.",
            "Well, as a large language model I have no humour, but here goes: knock knock.",
        ),
        ("boilerplate", "Tell me a joke.", "Knock knock.<|im_end|>"),
        ("boilerplate", "Tell me a joke.", "Knock knock.\n### Instruction: tell another"),
        ("boilerplate", "Write a letter.", "Dear [insert name here], thank you."),
        ("repetition", "Count.", "It goes on: " + "and then the dog barked at the cat " * 6),
        ("code", "Sort a list in Python.", "```python\ndef f(:\n    pass\n```"),
        ("code", "Sort a list in Python.", "def f(values):\nreturn sorted(values)"),
        ("form", "Reply in JSON with the name and the age of Ann, who is 7.", "Ann is 7."),
        ("form", "Is 7 prime? Answer with yes or no.", "It is divisible by itself alone."),
        ("form", r"What is 2 + 2? Put the answer within \boxed{}.", "It is 4."),
        ("form", "Write a Python function that adds two numbers.", "The sum is 7."),
    ],
)
def test_a_reply_is_removed(rule: str, question: str, reply: str) -> None:
    finding = found(question, reply)
    assert finding is not None and finding.rule == rule, finding


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("What is 6 * 7?", "42"),
        ("What did he say?", 'He said "I cannot help you" and left.'),
        ("Be a robot from the future.", "As an AI from Mars, dust is my home."),
        ("Describe language models.", "A language model gives texts probabilities."),
        ("Make an array of zeros.", "a = [" + "0, " * 40 + "0]"),
        ("Sing.", "La la la, and la la la, and then we all go home."),
        ("Sort in Python.", "```python\nprint(sorted([2, 1]))\n```\nThis prints a sorted list."),
        ("Sort in Python.", "def f(values):\n    return sorted(values)\n\nThis function sorts the values of a list."),
        ("Sort in Python.", "```python\n>>> sorted([2, 1])\n[1, 2]\n```"),
        ("Plot in Python.", "```python\n!pip install matplotlib\nimport matplotlib\n```"),
        ("Simplify this Python branch.", "```python\nelif a in (3, 4):\n```"),
        ("Sort in C.", "```c\nint main() { return 0; }\n```"),
        ("Sort in Python, or in Java.", "class A {\n  int x;\n}"),
        ("Write a function that returns JSON.", "def f(): return '{}'"),
        ("Reply in JSON, please.", 'Here it is: {"a": [1, 2]}'),
        ("Answer yes or no: is 7 prime?", "Yes, it is."),
        ("Write a SQL query for all names.", "SELECT name FROM people"),
        ("Create a workout program for a week.", "Run on Monday, rest on Tuesday."),
    ],
)
def test_a_reply_is_kept(question: str, reply: str) -> None:
    assert found(question, reply) is None


@pytest.mark.parametrize(("least", "most", "reply"), [(3, 9, "two words"), (0, 2, "these are three")])
def test_the_length_of_replies_is_counted_in_words(least: int, most: int, reply: str) -> None:
    finding = found("Why?", reply, Rules(min_words=least, max_words=most))
    assert finding is not None and finding.rule == "length" and f"{least} to {most}" in finding.why


def test_replies_in_other_languages_than_asked_for_are_removed() -> None:
    pytest.importorskip("py3langid")
    spanish = (
        "Claro, aquí tienes una receta sencilla: corta las patatas en trozos pequeños y fríelas con aceite. "
        "Después, añade sal y sirve el plato caliente."
    )
    english = "Of course, here is a simple recipe: cut the potatoes into small pieces and fry them in some oil."
    rules = Rules(languages=("en", "fr"))
    finding = found("How do I cook potatoes?", spanish, rules)
    assert finding is not None and finding.rule == "language" and finding.why.startswith("es")
    assert found("How do I cook potatoes?", english, rules) is None
    assert found("How do I cook potatoes?", spanish) is None  # any language, where none is asked for
    code = "```python\nfor zahl in range(10):\n    print(zahl)\n```"
    assert found("Zähle!", code, rules) is None


def test_an_answer_that_is_not_trained_is_not_judged() -> None:
    turns = (("Who won?", "I cannot help with that."), ("Please!", "The home team did."))
    assert find_in_replies(Conversation(turns, untrained=frozenset({0})), Rules()) is None
    assert find_in_replies(Conversation(turns), Rules()) is not None


def test_a_rule_that_is_not_asked_removes_nothing() -> None:
    assert found("Who won?", "I cannot help with that.", Rules(without=frozenset({"refusal"}))) is None


def test_rules_that_cannot_be_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="rule 'speling': expected one of length, refusal"):
        Rules(without=frozenset({"speling"}))
    with pytest.raises(InputError, match="5 to 4 words"):
        Rules(min_words=5, max_words=4)
    with pytest.raises(InputError, match="similarity 7"):
        Rules(near=7)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sign", ["\n", " \n", "x", "\u4e2d", "f(", "<a", "{\n", "x=", "`a", "$"])
@pytest.mark.parametrize("question", ["Write a Python program.", "Answer in JSON, with yes or no."])
def test_long_stretches_of_one_sign_take_no_time_to_speak_of(sign: str, question: str) -> None:
    # Each of these took minutes or more where an expression was tried from every place to the end.
    found(question, f"a{sign * 100_000}b", Rules(languages=("en",)))
