"""Lists as models give them."""

from __future__ import annotations

import pytest

from ultrafuser_mega.synthesis.forms import instruction_list, one_text, topic_list
from ultrafuser_mega.synthesis.requests import UnreadableError


@pytest.mark.parametrize(
    "text",
    [
        '{"items": [{"name": "Quantum Computing", "about": "Fast."}, {"name": "Law", "about": "Just."}]}',
        'So:\n```json\n[{"name": "Quantum Computing", "about": "Fast."}, {"name": "Law", "about": "Just."}]\n```',
        "1. **Quantum Computing**: Fast.\n2. **Law**: Just.",
        "Here are 2 topics:\n\n- Quantum Computing - Fast.\n- Law \u2013 Just.",
        "Quantum Computing: Fast.\n\nLaw: Just.\n",
    ],
)
def test_topics_are_found_in_any_usual_form(text: str) -> None:
    assert topic_list(2).read(text) == [("Quantum Computing", "Fast."), ("Law", "Just.")]


@pytest.mark.parametrize(
    "text",
    [
        '{"items": ["Write a loop.", "Explain it:\\n\\nx = 1"]}',
        "Write a loop.\n---\nExplain it:\n\nx = 1",
        "Sure, here are two instructions:\n\n1. Write a loop.\n2. Explain it:\n\nx = 1",
        "---\nWrite a loop.\n-----\nExplain it:\n\nx = 1\n---\n",
    ],
)
def test_instructions_are_found_in_any_usual_form(text: str) -> None:
    assert instruction_list(2).read(text) == ["Write a loop.", "Explain it:\n\nx = 1"]


@pytest.mark.parametrize(
    "text",
    ["I'm sorry, but I cannot help with that.", '{"items": ["Write a', "[]", '{"items": []}', '{"items": [1, 2]}'],
)
def test_what_is_no_list_of_instructions_is_told(text: str) -> None:
    with pytest.raises(UnreadableError):
        instruction_list(3).read(text)


def test_a_single_instruction_needs_no_list() -> None:
    assert instruction_list(1).read("Here is the instruction:\n\nWrite a loop.") == ["Write a loop."]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Here is the new instruction:\n\nDo it.", "Do it."),
        ('"Do it."', "Do it."),
        ('"A" and "B"', '"A" and "B"'),
        ("Here it is, with 3 parts: a, b, c.", "Here it is, with 3 parts: a, b, c."),
    ],
)
def test_what_models_say_around_a_text_is_left_out(text: str, kept: str) -> None:
    assert one_text().read(text) == kept


def test_schemas_hold_a_model_to_the_number_asked_for() -> None:
    schema = instruction_list(4).schema
    assert schema is not None
    items = schema["properties"]["items"]
    assert items["minItems"] == items["maxItems"] == 4 and schema["additionalProperties"] is False


def test_what_is_nested_too_deeply_is_no_list() -> None:
    with pytest.raises(UnreadableError):
        topic_list(1).read('{"items": ' + "[" * 100_000)


def test_half_of_a_surrogate_pair_becomes_a_sign_that_files_can_hold() -> None:
    assert instruction_list(1).read('{"items": ["Say \\ud83d it."]}') == ["Say \ufffd it."]
    assert topic_list(1).read('{"items": [{"name": "Law \\udc00s", "about": "\\ud83d\\ude00"}]}') == [
        ("Law \ufffds", "\U0001f600")
    ]
