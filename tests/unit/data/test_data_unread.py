"""What a row holds beside its conversation: content that is not read is told, ids and scores are not."""

from __future__ import annotations

from typing import Any

import pytest

from ultrafuser_mega.data.columns import check_columns, renamed
from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation
from ultrafuser_mega.data.unread import unread_fields
from ultrafuser_mega.errors import InputError

PAIR = {"instruction": "a", "output": "b"}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR | {"id": 7, "score": 0.5, "source": "alpaca", "uuid": "0f" * 16, "tags": ["a", "b"], "input": "c"}, []),
        (PAIR | {"system": "s", "history": [["c", "d"]], "context": "", "text": None, "choices": []}, []),
        (PAIR | {"response": "short"}, ["response"]),
        (PAIR | {"context": "Paris"}, ["context"]),
        (PAIR | {"text": "Below is an instruction that describes a task."}, ["text"]),
        (PAIR | {"choices": {"text": ["It is the largest of the three."], "label": ["A"]}}, ["choices"]),
        (PAIR | {"turns": [{"q": "a"}]}, ["turns"]),
        ({"question": "a", "answer": "b", "input": "c"}, ["input"]),
        ({"messages": CHAT, "prompt": "a"}, ["prompt"]),
        ({"messages": [CHAT[0] | {"name": "Ann"}, CHAT[1] | {"weight": 1}]}, ["messages[].name"]),
        ({"prompt": [CHAT[0] | {"name": "Ann"}], "completion": [CHAT[1] | {"weight": 1}]}, ["prompt[].name"]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], "input": "c", "history": [["d", "e"]]}, ["input", "history"]),
        ({"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "First I add, then I say it."}]}, None),
    ],
)
def test_content_that_is_not_read_is_named_and_what_only_describes_a_row_is_not(
    row: dict[str, Any], expected: list[str] | None
) -> None:
    to_conversation(row)
    assert unread_fields(row, {}) == (["messages[].reasoning_content"] if expected is None else expected)


def test_columns_give_a_files_own_names_and_only_they_are_read() -> None:
    columns = {"instruction": "query", "response": "answer", "system": "persona"}
    row = {"query": "a", "answer": "b", "prompt": "c", "system": "d", "tools": [{"name": "e"}]}
    assert to_conversation(renamed(row, columns)) == Conversation((("a", "b"),))
    assert unread_fields(row, columns) == ["prompt", "system", "tools"]
    with pytest.raises(MalformedRowError, match='missing field "answer", which columns names for response'):
        renamed({"query": "a"}, columns)


def test_columns_name_the_fields_of_messages_as_well() -> None:
    columns = {"messages": "dialogue", "role": "speaker", "content": "text"}
    row = {"dialogue": [{"speaker": "user", "text": "a"}, {"speaker": "assistant", "text": "b", "weight": 1}]}
    assert to_conversation(renamed(row, columns)) == Conversation((("a", "b"),))
    assert unread_fields(row, columns) == []


def test_columns_name_the_fields_of_the_messages_of_a_prompt_and_its_completion() -> None:
    columns = {"prompt": "asked", "completion": "told", "role": "speaker", "content": "text"}
    row = {"asked": [{"speaker": "user", "text": "a"}], "told": [{"speaker": "assistant", "text": "b"}]}
    assert to_conversation(renamed(row, columns)) == Conversation((("a", "b"),))
    assert unread_fields(row, columns) == []


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"instructions": "a", "output": "b"}, "instructions is no field that is read; columns maps from messages"),
        ({"instruction": "a"}, "names no conversation; it needs messages, or a question and its answer"),
        ({"role": "a", "content": "b"}, "names no conversation"),
    ],
)
def test_columns_that_cannot_give_a_conversation_are_refused(columns: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_columns(columns)
