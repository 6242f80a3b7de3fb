"""/v1/completions, /tokenize and /detokenize, around an engine that says what it is told."""

from __future__ import annotations

from typing import Any

import pytest
from support.live_server import LiveServer
from support.played_engine import PlayedEngine

from ultrafuser_mega.inference.model import OpenedModel

COMPLETIONS = "/v1/completions"


def test_raw_text_is_the_same_for_all_specialists(
    server: LiveServer, engine: PlayedEngine, opened: OpenedModel
) -> None:
    status, answer = server.ask(COMPLETIONS, {"prompt": "London is", "max_tokens": 64})
    assert status == 200 and answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == " London is the largest city."
    ids = opened.tokenizer("London is")["input_ids"]
    assert engine.requests[0].prompt == dict.fromkeys(("text", "code", "math"), ids)


def test_a_completion_is_short_unless_told(server: LiveServer) -> None:
    answer = server.ask(COMPLETIONS, {"prompt": "London is"})[1]
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", [["London is", "Rome is"], [[1, 20, 30], [1, 40]], [1, 20, 30]])
def test_many_prompts_are_answered_in_order(server: LiveServer, engine: PlayedEngine, prompt: Any) -> None:
    many = 2 if isinstance(prompt[0], str | list) else 1
    answer = server.ask(COMPLETIONS, {"prompt": prompt, "n": 2, "seed": 5, "max_tokens": 64})[1]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * many))
    assert sorted(request.row for request in engine.requests) == sorted([0, 1] * many)
    asked = {tuple(request.prompt["text"]) for request in engine.requests}
    assert answer["usage"]["prompt_tokens"] == sum(map(len, asked))


def test_echo_with_logprobs_scores_the_prompt(server: LiveServer, opened: OpenedModel) -> None:
    fields = {"prompt": "London is", "echo": True, "logprobs": 1, "temperature": 0}
    answer = server.ask(COMPLETIONS, {**fields, "max_tokens": 1})[1]["choices"][0]
    tokens = answer["logprobs"]["tokens"]
    assert tokens == ["<s>", " ", "L", "on", "d", "on", " is", " "]
    assert answer["text"] == "London is "
    assert answer["logprobs"]["token_logprobs"][0] is None and answer["logprobs"]["top_logprobs"][0] is None
    assert answer["logprobs"]["token_logprobs"][1:7] == [-1.5, -2.5, -3.5, -4.5, -5.5, -6.5]
    assert answer["logprobs"]["top_logprobs"][2] == {"L": -2.5}
    assert len(answer["logprobs"]["text_offset"]) == len(tokens)
    alone = server.ask(COMPLETIONS, {**fields, "max_tokens": 0})[1]
    assert alone["choices"][0]["text"] == "London is"
    assert alone["choices"][0]["logprobs"]["tokens"] == tokens[:-1]
    assert alone["usage"]["completion_tokens"] == 0
    parts = server.stream(COMPLETIONS, {**fields, "max_tokens": 1})[:-1]
    assert "".join(part["choices"][0]["text"] for part in parts) == "London is "
    lists = [part["choices"][0]["logprobs"] for part in parts]
    assert [token for one in lists if one for token in one["tokens"]] == tokens


def test_ids_are_echoed_as_text(server: LiveServer, opened: OpenedModel) -> None:
    ids = opened.tokenizer("London is")["input_ids"]
    fields = {"prompt": ids, "echo": True, "max_tokens": 0}
    assert server.ask(COMPLETIONS, fields)[1]["choices"][0]["text"] == "London is"


def test_an_answer_can_be_told_not_to_end(server: LiveServer, engine: PlayedEngine) -> None:
    answer = server.ask(COMPLETIONS, {"prompt": "London is", "ignore_eos": True, "max_tokens": 40})[1]
    assert answer["usage"]["completion_tokens"] == 40
    assert engine.requests[0].eos == frozenset()


def test_texts_become_ids_and_ids_texts(server: LiveServer, opened: OpenedModel) -> None:
    there = server.ask("/tokenize", {"prompt": "London is", "return_token_strs": True})[1]
    assert there["tokens"] == opened.tokenizer("London is")["input_ids"]
    assert there["count"] == len(there["tokens"]) and there["token_strs"][0] == "<s>"
    assert server.ask("/tokenize", {"prompt": "London is", "add_special_tokens": False})[1]["tokens"][0] != 1
    assert server.ask("/detokenize", {"tokens": there["tokens"][1:]})[1] == {"prompt": "London is"}


def test_a_conversations_prompts_are_shown_as_they_are_sent(server: LiveServer, opened: OpenedModel) -> None:
    messages = [{"role": "user", "content": "Which city?"}]
    shown = server.ask("/tokenize", {"messages": messages})[1]
    asked = opened.model.chat_ids([messages], opened.tokenizer)[0]
    assert {name: one["tokens"] for name, one in shown["specialists"].items()} == asked
    assert "[INST] Which city? [/INST]" in shown["specialists"]["code"]["text"]
    assert "### Instruction:" in shown["specialists"]["math"]["text"]
