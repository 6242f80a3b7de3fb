"""/v1/chat/completions, around an engine that says what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.live_server import LiveServer
from support.played_engine import PlayedEngine

from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.noise import draw_key

CHAT = "/v1/chat/completions"
SAID = "London is the largest city."


def test_an_answer_has_openais_shape_and_says_what_each_specialist_did(
    server: LiveServer, engine: PlayedEngine, opened: OpenedModel, question: dict[str, Any]
) -> None:
    status, answer = server.ask(CHAT, question)
    assert status == 200
    assert answer["object"] == "chat.completion" and answer["model"] == "toy" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": SAID, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None and choice["index"] == 0
    asked = opened.model.chat_ids([question["messages"]], opened.tokenizer)[0]
    assert engine.requests[0].prompt == asked
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(asked["text"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    specialists = usage["specialists"]
    assert {name: one["prompt_tokens"] for name, one in specialists.items()} == {n: len(i) for n, i in asked.items()}
    assert sum(one["led_tokens"] for one in specialists.values()) == usage["completion_tokens"]
    assert sum(one["mean_gate_weight"] for one in specialists.values()) == pytest.approx(1, abs=1e-5)


def test_a_stream_is_the_same_answer_in_pieces(server: LiveServer, question: dict[str, Any]) -> None:
    whole = server.ask(CHAT, question)[1]
    *events, done = server.stream(CHAT, {**question, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    *pieces, usage = events
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == SAID
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_a_stream_without_options_has_no_usage(server: LiveServer, question: dict[str, Any]) -> None:
    events = server.stream(CHAT, question)
    assert all("usage" not in event for event in events[:-1])


@pytest.mark.parametrize("stop", [" largest", [" never", " largest"]])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_ends_an_answer_and_is_not_in_it(
    server: LiveServer, question: dict[str, Any], stop: Any, streamed: bool
) -> None:
    if streamed:
        events = server.stream(CHAT, {**question, "stop": stop})[:-1]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = server.ask(CHAT, {**question, "stop": stop})[1]["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("London is the", "stop")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_an_answer_is_at_most_as_long_as_asked(server: LiveServer, question: dict[str, Any], field: str) -> None:
    answer = server.ask(CHAT, {**question, field: 5})[1]
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"


def test_n_answers_are_rows_of_one_seed(server: LiveServer, engine: PlayedEngine, question: dict[str, Any]) -> None:
    answer = server.ask(CHAT, {**question, "n": 3, "seed": 7})[1]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [(request.row, request.sampling.seed) for request in engine.requests] == [(0, 7), (1, 7), (2, 7)]
    assert answer["usage"]["completion_tokens"] % 3 == 0
    streamed = server.stream(CHAT, {**question, "n": 2})[:-1]
    texts = {0: "", 1: ""}
    for event in streamed:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: SAID, 1: SAID}


def test_fields_reach_the_engine(server: LiveServer, engine: PlayedEngine, question: dict[str, Any]) -> None:
    fields = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    server.ask(CHAT, {**question, **fields, **penalties, "logit_bias": {"5": -100, "17": 2.5}})
    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert {name: getattr(sampling, name) for name in penalties} == penalties
    assert dict(sampling.logit_bias) == {5: -100.0, 17: 2.5}


def test_what_is_null_or_unknown_is_as_if_left_out(
    server: LiveServer, engine: PlayedEngine, question: dict[str, Any]
) -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "max_tokens", "logit_bias", "tools", "response_format")
    status, _ = server.ask(CHAT, {**question, **dict.fromkeys(names), "user": "me", "of_tomorrow": {"x": [1]}})
    assert status == 200
    assert (engine.requests[0].sampling.temperature, engine.requests[0].sampling.top_p) == (1.0, 1.0)


def test_temperatures_next_to_nothing_are_greedy(
    server: LiveServer, engine: PlayedEngine, question: dict[str, Any]
) -> None:
    server.ask(CHAT, {**question, "temperature": 1e-8, "top_p": 0})
    assert engine.requests[0].sampling.temperature == 0
    assert engine.requests[0].sampling.top_p > 0


def test_a_seed_is_any_of_64_bits(server: LiveServer, engine: PlayedEngine, question: dict[str, Any]) -> None:
    seeds = [-(2**63), -1, 0, 2**32, 2**63 - 1]
    for seed in seeds:
        assert server.ask(CHAT, {**question, "seed": seed})[0] == 200
    assert [request.sampling.seed for request in engine.requests] == seeds
    assert len({draw_key(seed, 0, 0) for seed in seeds}) == len(seeds)


def test_answers_without_a_seed_are_drawn_anew(
    server: LiveServer, engine: PlayedEngine, question: dict[str, Any]
) -> None:
    for _ in range(3):
        server.ask(CHAT, question)
    assert len({request.sampling.seed for request in engine.requests}) > 1


def test_logprobs_name_tokens_and_their_bytes(server: LiveServer, question: dict[str, Any]) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    whole = server.ask(CHAT, {**question, **fields})[1]["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in whole] == [" ", "L", "on"]
    assert whole[2] == {
        "token": "on",
        "logprob": -0.1,
        "bytes": [111, 110],
        "top_logprobs": [
            {"token": "on", "logprob": -0.1, "bytes": [111, 110]},
            {"token": "\x02", "logprob": -2.5, "bytes": [2]},
        ],
    }
    parts = [event["choices"][0]["logprobs"] for event in server.stream(CHAT, {**question, **fields})[:-1]]
    assert [one for part in parts if part for one in part["content"]] == whole


def test_gate_weights_are_an_extension_that_is_asked_for(server: LiveServer, question: dict[str, Any]) -> None:
    assert "gate_weights" not in server.ask(CHAT, question)[1]["choices"][0]
    weights = server.ask(CHAT, {**question, "gate_weights": True})[1]["choices"][0]["gate_weights"]
    assert weights["specialists"] == ["text", "code", "math"]
    assert "".join(token["text"] for token in weights["tokens"]) == SAID
    assert weights["tokens"][1]["weights"] == pytest.approx([0.15, 0.7, 0.15])
    events = server.stream(CHAT, {**question, "gate_weights": True})[:-1]
    streamed = [one for event in events for one in event["choices"][0].get("gate_weights", {}).get("tokens", [])]
    assert streamed == [token for token in weights["tokens"] if token["text"]]


def test_texts_come_in_parts_and_systems_under_another_name(
    server: LiveServer, engine: PlayedEngine, opened: OpenedModel
) -> None:
    parts = [{"type": "text", "text": "Which city "}, {"type": "text", "text": "is the largest?"}]
    messages = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    assert server.ask(CHAT, {"messages": messages})[0] == 200
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which city is the largest?"}]
    assert engine.requests[0].prompt == opened.model.chat_ids([plain], opened.tokenizer)[0]


def test_a_format_is_held(opened: OpenedModel, serve: Callable[..., LiveServer], question: dict[str, Any]) -> None:
    import json

    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["London", "Rome"]}, "rank": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["city", "rank"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    server = serve()
    status, answer = server.ask(CHAT, {**question, "response_format": form})
    assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"
    held = json.loads(answer["choices"][0]["message"]["content"])
    assert held["city"] in ("London", "Rome") and 0 <= held["rank"] <= 9
    free = server.ask(CHAT, {**question, "response_format": {"type": "json_object"}, "max_tokens": 100})[1]
    assert isinstance(json.loads(free["choices"][0]["message"]["content"]), dict)
