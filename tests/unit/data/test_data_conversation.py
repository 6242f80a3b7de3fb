"""The shapes in which people keep instruction data, and every way in which a row is none of them."""

from __future__ import annotations

from typing import Any

import pytest

from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation, to_prompt


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
def test_every_shape_becomes_the_same_kind_of_conversation(row: Any, expected: Any) -> None:
    assert to_conversation(row) == expected


def _chat(*roles: str) -> dict[str, Any]:
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
        (
            {"prompt": "a", "completion": "\ud83d"},
            '"completion" is no Unicode text at character 0: half of a surrogate pair, or no UTF-8',
        ),
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
def test_a_malformed_row_says_what_is_wrong_with_it(row: Any, reason: Any) -> None:
    with pytest.raises(MalformedRowError, match=reason):
        to_conversation(row)


def _answered(*answers: dict[str, Any]) -> dict[str, Any]:
    turns = [({"role": "user", "content": "q"}, {"role": "assistant", **answer}) for answer in answers]
    return {"messages": [message for turn in turns for message in turn]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "S"},
            Conversation((("a", "b"), ("c", "d")), "S"),
        ),
        ({"prompt": "c", "completion": "d", "history": None, "messages": None}, Conversation((("c", "d"),))),
        (
            _answered({"content": "bad", "weight": 0}, {"content": "good", "weight": 1}),
            Conversation((("q", "bad"), ("q", "good")), untrained=frozenset({0})),
        ),
        (
            _answered({"content": "good"}, {"content": "bad", "train": False}),
            Conversation((("q", "good"), ("q", "bad")), untrained=frozenset({1})),
        ),
        (
            _answered({"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "tool_calls": None}),
            Conversation((("q", "a b"),)),
        ),
        (
            {"conversations": [{"role": "developer", "content": "S"}, {"role": "user", "content": "a"}]}
            | {"tools": "[]", "system": "S"},
            None,
        ),
        ({"prompt": "a", "completion": None, "response": "b", "label": True}, Conversation((("a", "b"),))),
    ],
)
def test_fields_that_change_what_a_row_means_are_honoured(row: Any, expected: Any) -> None:
    if expected is None:
        row["conversations"].append({"role": "assistant", "content": "b"})
        expected = Conversation((("a", "b"),), "S")
    assert to_conversation(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": "b", "history": "c"}, '"history" must be a list, found text'),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            "history\\[0\\] must be a list of an instruction and a",
        ),
        ({"instruction": "a", "output": "b", "history": [["c", ""]]}, "history\\[0\\].response is empty"),
        ({"prompt": "a", "completion": "b", "label": 0}, '"label" is false: an answer that should not be learnt'),
        ({"instruction": "a", "output": "b", "kto_tag": "false"}, '"kto_tag" is false: an answer'),
        ({"instruction": "a", "output": "b", "weight": 0}, '"weight" is 0: a row that should not be learnt'),
        ({"messages": _answered({"content": "a"})["messages"], "train": False}, '"train" is False: a row'),
        (_answered({"content": "a", "weight": 0.5}), "messages\\[1\\].weight is 0.5, expected 0 or 1"),
        (
            _answered({"content": "a", "weight": 0}),
            'nothing to train: every assistant message of "messages" has weight 0',
        ),
        (
            _answered({"content": None, "tool_calls": [{"id": "x"}]}),
            "messages\\[1\\].tool_calls holds what no template",
        ),
        (_answered({"content": "a", "function_call": {"name": "f"}}), "messages\\[1\\].function_call holds what no"),
        (
            _answered({"content": [{"type": "image_url"}]}),
            'messages\\[1\\].content\\[0\\] is "image_url", expected a part of',
        ),
        (_answered({"content": "a"}) | {"tools": [{"type": "function"}]}, '"tools" holds what no template here shows'),
        ({"prompt": "a", "completion": "b", "images": ["c.png"]}, '"images" holds what no template here shows'),
        ({"prompt": "a", "completion": "b", "label": False}, '"label" is false: an answer that should not be learnt'),
        ({"prompt": "a", "completion": "b", "system": "c", "system_prompt": "d"}, "hold two system texts"),
        (
            {"system": "c", "messages": [{"role": "system", "content": "d"}, *_answered({"content": "a"})["messages"]]},
            "messages\\[0\\] is another system text than the row's own",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(row: Any, reason: Any) -> None:
    with pytest.raises(MalformedRowError, match=reason):
        to_conversation(row)


@pytest.mark.parametrize(
    "row",
    [
        _answered({"content": "bad", "weight": 0}),
        {"messages": [{"role": "user", "content": "q"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
        {"prompt": "q", "label": False},
    ],
)
def test_a_prompt_asks_for_the_answer_whatever_is_said_of_the_one_that_stands_there(row: Any) -> None:
    assert to_prompt(row) == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize("switch", [{"loss": False}, {"trainable": False}, {"train": False}, {"weight": 0.0}])
def test_an_answer_is_context_by_whichever_name_it_is_switched_off(switch: dict[str, Any]) -> None:
    assert to_conversation(_answered({"content": "bad", **switch}, {"content": "good"})).untrained == {0}


def test_a_measured_loss_and_the_label_of_a_class_switch_nothing_off() -> None:
    assert to_conversation(_answered({"content": "a", "loss": 0}, {"content": "b", "loss": 1.37})).untrained == set()
    assert to_conversation({"instruction": "a", "output": "b", "label": 0, "loss": 0.0, "weight": "0 kg"}).turns


def test_a_row_that_is_not_to_be_learnt_may_still_be_asked() -> None:
    assert to_prompt({"prompt": "a", "completion": "b", "label": 0, "weight": 0}) == [{"role": "user", "content": "a"}]
