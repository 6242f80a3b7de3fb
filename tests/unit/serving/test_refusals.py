"""What a server does not answer, and how it says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from support.live_server import LiveServer
from support.played_engine import PlayedEngine
from transformers import PreTrainedTokenizerFast

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.serving.keys import VARIABLE, Keys
from ultrafuser_mega.serving.served import Served

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Which city?"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
NOPE = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}
AHEAD = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(?=a)"}}}

BAD_CHATS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": None}, "messages", "expected a valid array, found None"),
    ({"messages": []}, "messages", "found a list"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'assistant', found 'tool'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "found 5"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "is empty"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]", "found 'image_url'"),
    ({"messages": [USER, USER]}, "messages", "the roles are user, user; expected an optional system"),
    ({"messages": [USER, {"role": "assistant", "content": "So"}]}, "messages", "and user last"),
    ({"temperature": -1}, "temperature", "expected greater than or equal to 0, found -1"),
    ({"temperature": "hot"}, "temperature", "found 'hot'"),
    ({"top_p": 1.5}, "top_p", "found 1.5"),
    ({"n": 0}, "n", "found 0"),
    ({"n": 99999}, "n", "found 99999"),
    ({"max_tokens": -5}, "max_tokens", "found -5"),
    ({"max_tokens": "5"}, "max_tokens", "found '5'"),
    ({"seed": True}, "seed", "found True"),
    ({"max_tokens": 0}, "max_tokens", "expected greater than or equal to 1, found 0"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"seed": 2**63}, "seed", "found 9223372036854775808"),
    ({"seed": -(2**63) - 1}, "seed", "found -9223372036854775809"),
    ({"logit_bias": {"abc": 1}}, "logit_bias", "'abc' is no token; expected 0 to 399"),
    ({"logit_bias": {"400": 1}}, "logit_bias", "'400' is no token"),
    ({"logit_bias": {"4": 101}}, "logit_bias", "found 101"),
    ({"top_logprobs": 3}, "top_logprobs", "only with logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "found 21"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    ({"tools": [TOOL]}, "tools", "not offered"),
    ({"tool_choice": "required"}, "tool_choice", "not offered"),
    ({"functions": [TOOL]}, "functions", "not offered"),
    ({"modalities": ["text", "audio"]}, "modalities", "not offered"),
    ({"audio": {"voice": "x"}}, "audio", "not offered"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "found 'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
    ({"response_format": NOPE}, "response_format", "Invalid type: nope"),
    ({"response_format": AHEAD}, "response_format", "look-around"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "ends where it is complete"),
    ({"messages": [{"role": "user", "content": "so " * 400}]}, "messages", "maximum context length is 256 tokens"),
    # A megabyte of turns, of which the memory for all their prompts would end the server.
    (
        {"messages": [USER, {"role": "assistant", "content": "So"}] * 20_000 + [USER]},
        "messages",
        "40001 messages; this",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": "so " * 10**6}, USER]},
        "messages",
        "3,000,022 characters; this",
    ),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "missing"),
    ({"prompt": 5}, "prompt", "found 5"),
    ({"prompt": []}, "prompt", "is empty"),
    ({"prompt": [[1, 2], []]}, "prompt[1]", "is empty"),
    ({"prompt": [1, 400]}, "prompt", "token 400; the vocabulary has 0 to 399"),
    ({"prompt": [1, -1]}, "prompt[1]", "found -1"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "not offered"),
    ({"prompt": "x", "best_of": 3}, "best_of", "not offered"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "is for echo"),
    ({"prompt": "so " * 400}, "prompt", "maximum context length is 256 tokens"),
    ({"prompt": ["a", "so " * 10**6]}, "prompt[1]", "3,000,000 characters; this model's maximum context length is 256"),
]


def check_error(answer: Any, param: str | None, part: str) -> None:
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param
    assert part in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_a_bad_field_is_named_with_its_value(server: LiveServer, engine: PlayedEngine) -> None:
    for fields, param, part in BAD_CHATS:
        status, answer = server.ask(CHAT, {"messages": [USER], **fields})
        assert status == 400, fields
        check_error(answer, param, part)
    for fields, param, part in BAD_COMPLETIONS:
        status, answer = server.ask(COMPLETIONS, fields)
        assert status == 400, fields
        check_error(answer, param, part)
    assert server.ask(CHAT, {"messages": [USER], "stream": True, "n": 0})[0] == 400
    assert not engine.requests


def test_a_text_that_cannot_fit_holds_up_nobody(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def counting(self: PreTrainedTokenizerFast, text: str, **options: Any) -> Any:
        encoded.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    status, answer = server.ask("/tokenize", {"prompt": "so " * 10**6})
    assert status == 400 and not encoded
    check_error(answer, "prompt", "3,000,000 characters")
    assert server.ask("/tokenize", {"prompt": "so " * 400})[1]["count"] > 256 and encoded == [1200]


def test_more_answers_than_there_is_room_for_are_refused_before_any_is_prepared(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 262,144 held to a form the memory alone would end the server."""
    prepared: list[Any] = []
    monkeypatch.setattr(Served, "_wanted", lambda *given, **more: prepared.append(given))
    form = {"type": "json_object"}
    status, answer = server.ask(COMPLETIONS, {"prompt": [[1]] * 2048, "n": 128, "response_format": form})
    assert status == 400 and not prepared
    check_error(answer, "n", "262144 answers; this server has room for 512")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"messages": "\\ud800"}', b'{"a": ' + b"[" * 5000, b'{"temperature": NaN}'],
)
def test_a_body_that_is_no_json_object_is_refused(server: LiveServer, body: bytes) -> None:
    status, answer = server.ask(CHAT, body)
    assert status == 400
    assert set(answer) == {"error"}


def test_paths_models_and_media_that_are_not_there(server: LiveServer, question: dict[str, Any]) -> None:
    check_error(server.ask("/v2/nothing")[1], None, "not found")
    status, answer = server.ask(CHAT, {**question, "model": "gpt-9"})
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    check_error(answer, "model", "no model 'gpt-9' here; this server has 'toy'")
    assert server.ask("/v1/models/gpt-9")[0] == 404
    assert server.ask("/v1/models/toy")[1]["id"] == "toy"
    assert [one["id"] for one in server.ask("/v1/models")[1]["data"]] == ["toy"]
    assert server.ask(CHAT, {**question, "model": "toy"})[0] == 200
    assert server.open("PUT", CHAT, question).status == 405
    assert server.ask(CHAT, question, {"Content-Type": "text/plain"})[0] == 415


def test_what_clients_sent_is_in_no_log(
    serve: Callable[..., LiveServer], engine: PlayedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("sse_starlette").setLevel(logging.INFO)  # as `ultrafuser serve` has it
    server = serve(keys=("sesame-key",))
    secret = {"messages": [{"role": "user", "content": "my secret word"}]}
    key = {"Authorization": "Bearer sesame-key"}
    assert server.ask(CHAT, secret, key)[0] == 200
    assert server.ask(CHAT, {**secret, "n": "my secret word"}, key)[0] == 400
    assert server.ask("/my-secret-word?key=sesame-key", secret, key)[0] == 404
    assert server.ask(CHAT, secret, {"Authorization": "Bearer my-secret-word"})[0] == 401
    engine.failing = MemoryError("my secret word")
    server.ask(CHAT, secret, key)
    server.stop()
    said = caplog.text
    assert "POST /v1/chat/completions 200" in said and "(no such path) 404" in said
    assert "secret" not in said.replace("my secret word)", "") and "sesame" not in said


def test_only_keys_open_what_holds_content(serve: Callable[..., LiveServer], question: dict[str, Any]) -> None:
    server = serve(keys=("first", "second"))
    for path in ("/health", "/ready", "/version"):
        assert server.ask(path)[0] == 200
    assert server.open("GET", "/metrics").status == 200
    for headers in (
        {},
        {"Authorization": "Bearer third"},
        {"Authorization": "first"},
        {"Authorization": "Basic first"},
    ):
        status, answer = server.ask(CHAT, question, headers)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert "third" not in json.dumps(answer)
        assert server.ask("/v1/models", None, headers)[0] == 401
        assert server.ask("/openapi.json", None, headers)[0] == 401
    for key in ("first", "second"):
        assert server.ask(CHAT, question, {"Authorization": f"Bearer {key}"})[0] == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not Keys.load(None) and Keys.load(None).open(None)
    file = tmp_path / "keys"
    file.write_bytes(b"# ours\none\n\n  two \r\n")
    monkeypatch.setenv(VARIABLE, "three")
    keys = Keys.load(file)
    opens = {key: keys.open(f"Bearer {key}".encode()) for key in ("one", "two", "three", "four", "# ours", "")}
    assert opens == {"one": True, "two": True, "three": True, "four": False, "# ours": False, "": False}
    file.write_text("# none\n")
    for path, part in ((file, "holds no key"), (tmp_path / "missing", "cannot be read")):
        with pytest.raises(InputError, match=part):
            Keys.load(path)
    file.write_text("with space\n")
    with pytest.raises(InputError, match="may hold no space"):
        Keys.load(file)


def test_a_body_beyond_the_limit_is_refused(serve: Callable[..., LiveServer]) -> None:
    server = serve(largest_body=2000)
    body = {"messages": [{"role": "user", "content": "x" * 3000}]}
    status, answer = server.ask(CHAT, body)
    assert status == 413
    check_error(answer, None, "larger than 2000 bytes")
    chunked = iter([json.dumps(body).encode()[:1500], json.dumps(body).encode()[1500:]])  # says no length
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", CHAT, chunked, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_an_engine_that_refuses_is_the_clients_fault(
    serve: Callable[..., LiveServer], question: dict[str, Any], opened: Any, says: Any
) -> None:
    small = PlayedEngine(opened.model.names, lambda request: says("London."), room=256)
    server = serve(small)
    small._room = 100  # as where other requests' needs are counted otherwise than by the front
    for streamed in (False, True):
        status, answer = server.ask(CHAT, {**question, "stream": streamed})
        assert status == 400
        check_error(answer, None, "does not fit into 100")
