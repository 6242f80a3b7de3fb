"""What is served is what is computed offline, whoever else is served."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.live_server import LiveServer

from ultrafuser_mega.inference.answer import Answer, Answerer, Limits
from ultrafuser_mega.inference.embedded import Serving
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.sampling import Sampling

WORDS = ["Which", "city", "is", "the", "largest?", "London,", "Berlin", "and", "Rome", "Janet", "has", "3", "apples"]
BYTES = range(3, 259)  # single ones, whose text may change with those that follow


def mixed(count: int) -> list[dict[str, Any]]:
    draw = random.Random(7)
    bodies = []
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))
        body: dict[str, Any] = {"max_tokens": draw.randint(1, 24), "temperature": draw.choice([0.0, 0.0, 0.8, 1.3])}
        body |= {"seed": number, "top_k": draw.choice([0, 20]), "stop": draw.choice([None, "e"])}
        body["logit_bias"] = dict.fromkeys(map(str, BYTES), -100)
        raw = draw.random() < 0.3
        bodies.append({**body, **({"prompt": text} if raw else {"messages": [{"role": "user", "content": text}]})})
    return bodies


def offline(answerer: Answerer, body: dict[str, Any]) -> str:
    raw = "prompt" in body
    prompt = answerer.encode_raw(body["prompt"]) if raw else answerer.encode(body["messages"])
    limits = Limits(body["max_tokens"], () if body["stop"] is None else (body["stop"],))
    sampling = Sampling(
        temperature=body["temperature"], top_k=body["top_k"], seed=body["seed"], logit_bias=dict.fromkeys(BYTES, -100.0)
    )
    for event in answerer.stream([prompt], limits, sampling, lead=not raw):
        if isinstance(event, tuple):
            answer: Answer = event[1]
    return answer.text


@pytest.fixture(scope="module")
def wanted(opened: OpenedModel) -> list[str]:
    answerer = Answerer(opened, Serving(rows=1, draft=0))
    return [offline(answerer, body) for body in mixed(40)]


def served(server: LiveServer, body: dict[str, Any]) -> str:
    if "prompt" in body:
        return server.ask("/v1/completions", body)[1]["choices"][0]["text"]
    if body["seed"] % 2:
        events = server.stream("/v1/chat/completions", body)[:-1]
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    return server.ask("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]


@pytest.mark.parametrize("clients", [1, 16])
def test_served_answers_are_those_that_are_computed_offline(
    computing: LiveServer, wanted: list[str], clients: int
) -> None:
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda body: served(computing, body), mixed(40)))
    assert found == wanted


def test_choices_are_rows_of_the_seed(computing: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "Which city?"}], "seed": 3, "max_tokens": 12, "temperature": 1.0}
    choices = computing.ask("/v1/chat/completions", {**body, "n": 3})[1]["choices"]
    three = [choice["message"]["content"] for choice in choices]
    assert len(set(three)) == 3
    again = computing.ask("/v1/chat/completions", {**body, "n": 2})[1]["choices"]
    assert [choice["message"]["content"] for choice in again] == three[:2]
