"""Many clients: limits, clients that leave, an engine that fails, a server that ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.live_server import LiveServer
from support.played_engine import PlayedEngine

from ultrafuser_mega.inference.model import OpenedModel

CHAT = "/v1/chat/completions"


@pytest.fixture
def slow(opened: OpenedModel, says: Callable[[str], list[int]]) -> PlayedEngine:
    """Answers of 100 tokens, a hundredth of a second each."""
    return PlayedEngine(opened.model.names, lambda request: says("so it is. ")[:-1], pause=0.01)


@pytest.fixture
def long(question: dict[str, Any]) -> dict[str, Any]:
    return {**question, "max_tokens": 100}


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hang_up(server: LiveServer, body: dict[str, Any], read: int) -> None:
    """Ask, read a little, go."""
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + raw)
        if read:
            connection.recv(read)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_hangs_up_frees_its_row(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any], streamed: bool
) -> None:
    server = serve(slow)
    body = {**long, "stream": streamed, "n": 2}
    if streamed:
        hang_up(server, body, 10)
    else:
        leaver = threading.Thread(target=hang_up, args=(server, body, 0))
        leaver.start()
        leaver.join()
    eventually(lambda: len(slow.requests) == 2 and slow.idle)
    assert {request.id for request in slow.requests} == set(slow.cancelled)
    assert server.front.traffic._underway == 0
    text = server.open("GET", "/metrics").read().decode()
    assert 'request_success_total{finished_reason="abort",model_name="toy"} 2.0' in text


def test_more_than_the_queue_holds_is_told_when_to_come_back(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any]
) -> None:
    server = serve(slow, most=6)

    def ask(_: int) -> tuple[int, str | None]:
        with server.open("POST", CHAT, long) as response:
            response.read()
            return response.status, response.headers["Retry-After"]

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert {status for status, _ in answers} == {200, 429}
    assert sum(status == 200 for status, _ in answers) >= 6
    assert all((wait is not None and int(wait) >= 1) == (status == 429) for status, wait in answers)
    status, answer = server.ask(CHAT, {**long, "n": 7})
    assert status == 400 and answer["error"]["param"] == "n"


def test_one_answer_that_fails_leaves_the_others(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any]
) -> None:
    server = serve(slow)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.ask, CHAT, long)
        eventually(lambda: len(slow.requests) == 1)
        results: list[Any] = []
        answering = threading.Thread(target=lambda: results.append(server.ask(CHAT, long)))
        answering.start()
        eventually(lambda: len(slow.requests) == 2)
        slow.failed.add(slow.requests[1].id)
        answering.join()
        assert results[0][0] == 500 and results[0][1]["error"]["message"] == "the logits are not finite"
        assert other.result()[0] == 200


def test_an_error_behind_a_streams_beginning_is_its_last_event(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any]
) -> None:
    server = serve(slow)
    response = server.open("POST", CHAT, {**long, "stream": True})
    assert response.readline().startswith(b"data: {")
    slow.failed.add(slow.requests[0].id)
    last = response.read().decode().strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_no_memory_for_a_step_is_survived(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any]
) -> None:
    server = serve(slow)
    slow.failing = MemoryError()
    status, answer = server.ask(CHAT, long)
    assert status == 500 and "no memory left" in answer["error"]["message"]
    assert server.ask("/ready")[0] == 200
    assert server.ask(CHAT, {**long, "max_tokens": 2})[0] == 200


def test_an_engine_that_dies_ends_the_server_and_names_itself(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any]
) -> None:
    server = serve(slow)
    slow.failing = RuntimeError("the math engine was killed by signal 9")
    status, answer = server.ask(CHAT, long)
    assert status == 503
    assert answer["error"]["message"] == "the engine ended: RuntimeError: the math engine was killed by signal 9"
    server.join()
    assert server.failure == answer["error"]["message"]


def test_a_server_without_an_engine_is_not_ready(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any]
) -> None:
    server = serve(slow)
    server.front.traffic.worker.failure = "the engine ended: so it is"
    for path, body in (("/ready", None), ("/health", None), (CHAT, long)):
        status, answer = server.ask(path, body)
        assert status == 503 and "so it is" in answer["error"]["message"]
    server.front.traffic.worker.failure = None


def test_a_server_that_ends_lets_answers_finish_and_takes_none(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any]
) -> None:
    server = serve(slow)
    response = server.open("POST", CHAT, {**long, "stream": True})
    response.readline()
    server.ask_to_stop()
    eventually(lambda: server.front.traffic.refusal is not None)
    assert server.ask("/health")[0] == 200
    for path, body in (("/ready", None), (CHAT, long)):
        status, answer = server.ask(path, body)
        assert status == 503 and "shutting down" in answer["error"]["message"]
    assert response.read().decode().strip().endswith("data: [DONE]")
    server.join()
    assert server.failure is None and not slow.cancelled


def test_a_server_whose_time_is_over_ends_its_answers(
    serve: Callable[..., LiveServer], slow: PlayedEngine, long: dict[str, Any]
) -> None:
    server = serve(slow, drain=0.05)
    response = server.open("POST", CHAT, {**long, "stream": True})
    response.readline()
    server.ask_to_stop()
    last = response.read().decode().strip().splitlines()[-1]
    assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    server.join()
    assert slow.idle


def test_numbers_are_under_vllms_names(server: LiveServer, question: dict[str, Any]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    server.ask(CHAT, question)
    with server.open("GET", "/metrics") as response:
        families = {one.name: one for one in text_string_to_metric_families(response.read().decode())}
    ours = {name.removeprefix("ultrafuser:") for name in families}
    assert {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_success",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "gate_weight_mean",
    } <= ours
    means = {sample.labels["specialist"]: sample.value for sample in families["ultrafuser:gate_weight_mean"].samples}
    assert sum(means.values()) == pytest.approx(1)
    assert all(sample.labels["model_name"] == "toy" for one in families.values() for sample in one.samples)
