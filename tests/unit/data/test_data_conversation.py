"""The shapes in which people keep instruction data, and every way in which a row is none of them."""

from __future__ import annotations

import pytest

from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, Conversation((("Add\n1 2", "3"),))),
        ({"instruction": "Add", "input": " ", "response": "3"}, Conversation((("Add", "3"),))),
        ({"instruction": "Add", "input": None, "output": "3", "id": 7}, Conversation((("Add", "3"),))),
        ({"question": "2+2?", "answer": "4 #### 4"}, Conversation((("2+2?", "4 #### 4"),))),
        (
            {"system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
            Conversation((("2+2?", "4"),), "Be brief."),
        ),
        ({"prompt": "Hi", "completion": " there"}, Conversation((("Hi", " there"),))),
        ({"prompt": "Hi", "response": "there"}, Conversation((("Hi", "there"),))),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "user", "value": "c"},
                    {"from": "assistant", "value": "d"},
                ]
            },
            Conversation((("a", "b"), ("c", "d")), "S"),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                "prompt": "messages come first",
            },
            Conversation((("a", "b"),)),
        ),
    ],
)
def test_every_shape_becomes_the_same_kind_of_conversation(row, expected):
    assert to_conversation(row) == expected


def _chat(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "expected an object, found text"),
        (None, "expected an object, found null"),
        ({}, "unknown shape.*found the fields none"),
        ({"text": "a", "label": 1}, "unknown shape: expected messages.*found the fields label, text"),
        ({"instruction": "a"}, 'missing field "output" \\(or "response"\\) beside "instruction"'),
        ({"question": "a", "output": "b"}, 'missing field "answer"'),
        ({"instruction": "a", "output": ""}, '"output" is empty'),
        ({"instruction": "a", "output": " \n"}, '"output" is empty'),
        ({"instruction": "", "output": "b"}, '"instruction" is empty'),
        ({"instruction": "a", "input": ["b"], "output": "c"}, '"input" must be text, found a list'),
        ({"question": "a", "answer": 42}, '"answer" must be text, found a number'),
        ({"prompt": "a", "completion": None}, '"completion" must be text, found null'),
        ({"prompt": "a", "completion": "b", "system": 1}, '"system" must be text, found a number'),
        ({"prompt": "a", "completion": "\ud83d"}, '"completion" holds half of a surrogate pair at character 0'),
        ({"messages": "a"}, '"messages" must be a list, found text'),
        ({"messages": []}, '"messages" holds no assistant message'),
        ({"messages": ["a"]}, "messages\\[0\\] must be an object, found text"),
        ({"messages": [{"content": "a"}]}, "missing field messages\\[0\\].role"),
        ({"messages": [{"role": "user"}]}, "missing field messages\\[0\\].content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 'messages\\[0\\].role is "tool", expected system, user'),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations\\[0\\].value must be text"),
        (_chat("assistant", "user"), "odd role order: messages\\[0\\] is an assistant message that no user"),
        (_chat("user", "user", "assistant"), "odd role order: messages\\[1\\] is a second user message"),
        (_chat("user", "assistant", "assistant"), "odd role order: messages\\[2\\] is an assistant message"),
        (_chat("user", "assistant", "user"), 'odd role order: "messages" ends with a user message'),
        (_chat("user", "system", "assistant"), "odd role order: messages\\[1\\] is system"),
    ],
)
def test_a_malformed_row_says_what_is_wrong_with_it(row, reason):
    with pytest.raises(MalformedRowError, match=reason):
        to_conversation(row)
