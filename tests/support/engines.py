"""Engines and the tokens that they answer with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from support.release_prompts import STEPS

from ultrafuser_mega.inference.embedded import cache_tokens
from ultrafuser_mega.inference.engine import EmbeddedEngine
from ultrafuser_mega.inference.mixing import RULES, Rule
from ultrafuser_mega.inference.requests import Engine, FailedEvent, Prompt, Request, TokenEvent
from ultrafuser_mega.inference.sampling import Sampling

GREEDY = Sampling()


class Alternating:
    """A constraint: odd and even tokens in turn."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def mask(self, scores: Any) -> None:
        scores[len(self.heard) % 2 :: 2] = float("-inf")

    def accept(self, token: int) -> None:
        self.heard.append(token)


def engine_of(model: Any, rule: str | Rule = "gate", rows: int = 16, **options: Any) -> EmbeddedEngine:
    options = {"tokens": cache_tokens(model, rows), "adapt": False} | options
    return EmbeddedEngine(model, RULES[rule] if isinstance(rule, str) else rule, rows=rows, **options)


def asked(
    prompts: Sequence[Prompt],
    steps: int | Sequence[int] = STEPS,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    eos: Collection[int] = (),
    first_row: int = 0,
    **options: Any,
) -> list[Request]:
    lengths = [steps] * len(prompts) if isinstance(steps, int) else steps
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    return [
        Request(str(row), prompt, own, length, frozenset(eos), row, **options)
        for row, (prompt, length, own) in enumerate(zip(prompts, lengths, settings, strict=True), first_row)
    ]


def events_of(engine: Engine, requests: Sequence[Request]) -> list[Any]:
    for request in requests:
        engine.submit(request)
    events: list[Any] = []
    while not engine.idle:
        events += engine.step()
    return events


def tokens_of(events: Sequence[Any]) -> dict[int, list[int]]:
    """Row -> its tokens."""
    answers: dict[int, list[int]] = {}
    for event in events:
        assert not isinstance(event, FailedEvent), event
        if isinstance(event, TokenEvent):
            answers.setdefault(int(event.id), []).append(event.token)
    return dict(sorted(answers.items()))


def decode(engine: Engine, prompts: Sequence[Prompt], *arguments: Any, **options: Any) -> dict[int, list[int]]:
    """Row -> its tokens, for prompts that are asked all at once."""
    return tokens_of(events_of(engine, asked(prompts, *arguments, **options)))
